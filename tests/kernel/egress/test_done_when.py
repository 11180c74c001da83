"""The promises of the egress guard.

Of 1, the webhook, channel, workflow step, import and template index wait for the plugins that have them: here their
sinks' clients are judged, and S3 (`tests/promises`) has the corpus. 6 is in `tests/plugins/tasks/test_redaction.py`,
its alarm in `test_secrets.py` beside that, all forms and features in S7; 7 is in `tests/kernel/redact`, 8 in
`tests/architecture`.
"""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest

from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked
from corral.errors import Invalid
from corral.testing.stub_servers import PUBLIC, StubServer, http_response_bytes
from corral_core.health.service.egress_audit import SINKS
from corral_core.health.service.egress_check import judge

MakeEgress = Callable[..., Egress]


@pytest.mark.parametrize("sink", SINKS)
async def test_egress_1_internal_addresses_in_any_spelling(make_egress: MakeEgress, sink: str) -> None:
    egress = make_egress()
    async with StubServer() as here, egress.client(sink) as client:
        for host in ("169.254.169.254", f"[::ffff:127.0.0.1]:{here.port}", f"0x7f.1:{here.port}"):
            with pytest.raises(EgressBlocked):
                await client.get(f"http://{host}/")
            with pytest.raises(Invalid):
                await egress.check_saved_url(f"http://{host}/")
        assert here.connections == 0


async def test_egress_2_a_name_that_changes_its_mind(make_egress: MakeEgress) -> None:
    async with StubServer() as here:
        egress = make_egress({"rebind.example": [[PUBLIC], ["127.0.0.1"]]})
        url = f"http://rebind.example:{here.port}/"
        assert (await judge(egress, url)).allowed
        async with egress.client("webhook") as client:
            for _ in range(2):
                with pytest.raises(EgressBlocked):
                    await client.post(url, content=b"{}")
        assert here.connections == 0


async def test_egress_3_a_redirect_is_an_answer_and_no_order(make_egress: MakeEgress) -> None:
    async with StubServer() as inside, StubServer(http_response_bytes(302, location=inside.url)) as outside:
        egress = make_egress(allow=[f"127.0.0.1:{outside.port}", f"127.0.0.1:{inside.port}"])
        async with egress.client("webhook") as client:
            assert (await client.get(outside.url)).status_code == 302
        assert inside.connections == 0


async def test_egress_4_an_exception_opens_one_port(make_egress: MakeEgress) -> None:
    async with StubServer() as opened, StubServer() as closed:
        egress = make_egress(allow=[f"127.0.0.1:{opened.port}"])
        async with egress.client("webhook") as client:
            assert (await client.get(opened.url)).text == "ok"
            with pytest.raises(EgressBlocked):
                await client.get(closed.url)
        assert (opened.connections, closed.connections) == (1, 0)


async def test_egress_5_thirty_ordinary_addresses(make_egress: MakeEgress) -> None:
    hosts = ["example.com", "sub.a-b.example", "bücher.example", "例え.example", "xn--bcher-kva.example"]
    ports = ["", ":80", ":443", ":1024", ":8443", ":65535"]
    names = {httpx2.URL(f"http://{host}").raw_host.decode(): [[PUBLIC, "2606:4700::1111"]] for host in hosts}
    egress = make_egress(names)
    for host in (*hosts, "1.1.1.1", "[2606:4700:4700::1111]"):
        for port in ports:
            assert await egress.check_saved_url(f"https://{host}{port}/hook?x=1") == []
