"""comfyd: a durable REST service in front of ComfyUI. This package never imports its own parts here."""

__version__ = "0.1.0"
