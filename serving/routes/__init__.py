"""The routes of the API under /v1, and the health checks: a file for each subject."""

from fastapi import APIRouter

from serving.routes import health as _health
from serving.routes import indexes, info, items, search

api = APIRouter(prefix="/v1")
for _subject in (search, items, indexes, info):
    api.include_router(_subject.router)
health = _health.router
