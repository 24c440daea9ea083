"""aiohttp: a server whose handlers await run_in_executor, asked by many clients at once."""

import asyncio
import hashlib
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from compat_tests.clients.doors import Doors, worked, workload


def digest(text: str, rounds: int) -> str:
    worked()
    for _ in range(rounds):
        text = hashlib.sha256(text.encode()).hexdigest()
    return text


def refuse(text: str, rounds: int) -> str:
    worked()
    raise ValueError(f"{text} is refused")


async def _serve(executor: Any) -> Any:
    async def handler(request: web.Request) -> web.Response:
        loop = asyncio.get_running_loop()
        try:
            function = refuse if request.query["text"] == "7" else digest
            return web.json_response(await loop.run_in_executor(executor, function, request.query["text"], 50))
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error

    application = web.Application()
    application.router.add_get("/digest", handler)

    async with TestClient(TestServer(application)) as client:
        async def ask(number: int) -> tuple[int, str]:
            async with client.get("/digest", params={"text": str(number)}) as response:
                return response.status, await response.text()

        return await asyncio.gather(*(ask(number) for number in range(80)))


@workload
def server(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return asyncio.run(_serve(executor))
