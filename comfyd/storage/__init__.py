"""Where artefacts go: the `Storage` protocol and its implementations. Never knows tasks or ComfyUI."""
