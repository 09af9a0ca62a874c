"""The upstream client: HTTP/1.1 on the event loop's own transports, with nothing between a socket and a relay.

`client` routes a request to a connection: one out of its origin's `pool`, or a new one that `dialing` makes (through a
`tunnel` where a proxy wants one). A `connection` reads an answer off the wire into an `Answer`. What goes through SOCKS
proxies alone is left to aiohttp.
"""

from balancer.gateway.upstream.client import UpstreamClient as UpstreamClient
