"""Where tasks rest: the `Store` protocol and its implementations. Never decides, logs or sleeps."""
