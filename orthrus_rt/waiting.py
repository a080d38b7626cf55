"""A stream of an AsyncEngine that waits for its outputs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from orthrus_rt.outputs import RequestOutput


@dataclass
class Waiting:
    """What the engine's thread tells a stream, until its reader takes it. At most one output waits, as later ones are
    merged with it; nothing behind an error is read.

    Attributes:
        request_id: the caller's.
        failed: the last item of news is the error that ends the stream.
    """

    request_id: str
    news: list[RequestOutput | BaseException] = field(default_factory=list)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    failed: bool = False

    def tell(self, news: RequestOutput | BaseException) -> None:
        """Pass ``news`` to the reader, merged with an output that it has not read yet."""
        last = self.news[-1] if self.news else None
        if isinstance(news, RequestOutput) and isinstance(last, RequestOutput):
            last.new_token_ids += news.new_token_ids
            last.finish_reason, last.stats, last.error = news.finish_reason, news.stats, news.error
        else:
            self.news.append(news)
        self.has_news.set()

    async def read(self) -> RequestOutput | BaseException:
        """Wait for the next output or error."""
        await self.has_news.wait()
        news = self.news.pop(0)
        if not self.news:
            self.has_news.clear()
        return news
