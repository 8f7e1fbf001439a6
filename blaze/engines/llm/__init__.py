"""The LLM engine: any Hugging Face causal language model, through transformers."""
