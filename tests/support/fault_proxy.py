"""A proxy in front of a real server that can do to any request what the embedded server can.

with FaultProxy(cyrus.http_port) as proxy:
    proxy.faults.append(Fault(lambda request: request.method == "PUT", work=True, drop=True))
    run_the_client(proxy.origin)
"""

import http.client
from collections.abc import Callable

from jmap_server import Account, Fault, JMAPServer, Reply, Request

# They are of one connection (RFC 9110 section 7.6.1), or the proxy's to say.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"}
UPSTREAM_SECONDS = 30


class FaultProxy(JMAPServer):
    """The embedded server with its work done by another: `on_request`, `faults`, `requests`,
    `pause` and `resume` are the same. A fault's `errors`, `refuse`, `edit` and `before_call` are
    for the embedded server alone; event streams are not passed on. `edit_reply` may change what
    the other answers."""

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.edit_reply: Callable[[Request, Reply], object] = lambda *_: None
        super().__init__(account=Account())

    def _work(self, request: Request, fault: Fault) -> Reply:
        unwanted = HOP_BY_HOP | {"accept-encoding"}  # a reply is edited as plain text
        headers = {name: text for name, text in request.headers.items() if name not in unwanted}
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=UPSTREAM_SECONDS)
        try:
            upstream.request(request.method, request.target, request.body, headers)
            answer = upstream.getresponse()
            told = {
                name: text for name, text in answer.getheaders() if name.lower() not in HOP_BY_HOP
            }
            reply = Reply(answer.status, answer.read(), told)
            self.edit_reply(request, reply)
            return reply
        except (OSError, http.client.HTTPException) as error:
            self.crashes.append(error)
            return Reply(502)
        finally:
            upstream.close()
