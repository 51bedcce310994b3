"""The OpenAPI document keeps its word: requests made up from it, as it wants them and not, end as it says."""

import hypothesis
import pytest
import requests
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, assume
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, CheckFunction, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.unit.serving.small_index import LOCAL

NUM_EXAMPLES = 10  # of each operation and kind
LONGEST_URL = 60_000  # that the client sends
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


# The server's own threads draw from `random` meanwhile: beartype does, to choose which item of a list it checks.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation_answers_as_it_says(
    writing_client: TestClient, mode: GenerationMode, subtests: pytest.Subtests
) -> None:
    schema = schemathesis.openapi.from_dict(writing_client.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert operations
    for operation in operations:
        # What takes no parameters and no body cannot be asked wrongly.
        if mode is GenerationMode.NEGATIVE and not (list(operation.iter_parameters()) or operation.body):
            continue
        with subtests.test(operation.label):
            _ask(writing_client, operation.as_strategy(generation_mode=mode), _checks_of(operation))


def _checks_of(operation: APIOperation) -> list[CheckFunction]:
    # A batch is not refused for one wrong query in it: its answer tells which.
    return [check for check in CHECKS if operation.path != "/v1/search:batch" or check is not negative_data_rejection]


def _ask(client: TestClient, cases: st.SearchStrategy[Case], checks: list[CheckFunction]) -> None:
    @hypothesis.seed(7)
    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases)
    def ask(case: Case) -> None:
        request = requests.Request(**case.as_transport_kwargs(base_url=LOCAL)).prepare()
        assume(len(request.url or "") < LONGEST_URL)
        answer = client.request(
            request.method or "", request.url or "", content=request.body or b"", headers=dict(request.headers)
        )
        case.validate_response(answer, checks=checks)

    ask()
