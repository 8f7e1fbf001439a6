"""What is known of replicas and Routers, and what follows from it: pure, with an injected clock."""
