"""The Comfy API v2: the same tasks and files in the words of the official SDKs; never a path of its own."""
