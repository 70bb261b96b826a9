"""`memedge serve`: the gate over HTTP. Needs the extra `serve`."""
