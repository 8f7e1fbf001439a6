"""How many replicas a model has: fixed, or within bounds by the requests in flight."""

from __future__ import annotations

from ray.serve.config import AutoscalingConfig as ServeAutoscalingConfig

from blaze.config import ModelConfig


def scaling_options(model: ModelConfig) -> dict[str, object]:
    """Options for ``Deployment.options``: ``num_replicas`` or ``autoscaling_config``."""
    scaling = model.autoscaling
    if scaling is None:
        return {"num_replicas": model.replicas or 1}
    return {
        "autoscaling_config": ServeAutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_in_flight,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
        )
    }
