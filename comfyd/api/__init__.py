"""The edge: HTTP, Server-Sent Events and WebSockets in front of the legs; never runs a task itself.

`routes` holds the whole route table and makes the ASGI app; `errors` is the only place that knows HTTP
statuses of errors; `operations` describes each route for the OpenAPI document.
"""
