"""tornado: handlers of an HTTP server await IOLoop.run_in_executor."""

import asyncio
from typing import Any

from tornado import httpclient, httpserver, ioloop, netutil, web

from compat_tests.clients.doors import Doors, worked, workload


def collatz(number: int) -> int:
    worked()
    steps = 0
    while number != 1:
        number = 3 * number + 1 if number % 2 else number // 2
        steps += 1
    return steps


async def _serve(executor: Any) -> Any:
    class Handler(web.RequestHandler):
        async def get(self, number: str) -> None:
            self.write({"steps": await ioloop.IOLoop.current().run_in_executor(executor, collatz, int(number))})

    sockets = netutil.bind_sockets(0, "127.0.0.1")
    port = sockets[0].getsockname()[1]
    server = httpserver.HTTPServer(web.Application([(r"/collatz/(\d+)", Handler)]))
    server.add_sockets(sockets)
    client = httpclient.AsyncHTTPClient()
    try:
        answers = await asyncio.gather(*(client.fetch(f"http://127.0.0.1:{port}/collatz/{number}")
                                         for number in range(1, 60)))
        return [answer.body for answer in answers]
    finally:
        server.stop()
        await server.close_all_connections()
        client.close()


@workload
def server(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return asyncio.run(_serve(executor))
