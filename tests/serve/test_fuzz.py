"""The described API under thousands of made-up requests: no failure of the server, no answer that is not described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import tsotsallm
from tests.serve.running import serving
from tsotsallm.serve.served import Loading, Models, load_all

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in the extra [dev]")
pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
pytestmark = pytest.mark.slow
EXAMPLES = 250
LEAST = 2000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tsotsallm.to_gguf("embedded", path, dense="f16", verify=False)
    models = Models()
    load_all([str(path)], Loading(slots=2), models, lambda _line: None)
    with serving(models, most_tokens=50) as found:
        yield found


def test_no_request_breaks_it(address: str) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import load_all_checks, not_a_server_error
    from schemathesis.specs.openapi import checks as known

    load_all_checks()
    checks = [not_a_server_error, known.status_code_conformance, known.content_type_conformance,
              known.response_schema_conformance, known.response_headers_conformance]
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            try:
                strategy = operation.as_strategy(generation_mode=mode)

                @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                          suppress_health_check=list(HealthCheck))
                @given(case=strategy)
                def ask(case: Any) -> None:
                    found = case.call(base_url=address, timeout=120)
                    statuses[case.operation.path, found.status_code] += 1
                    case.validate_response(found, checks=checks)

                ask()
            except Unsatisfiable:       # nothing about this operation can be wrong
                continue
    assert statuses.total() >= LEAST, statuses
    assert not [one for one in statuses if one[1] >= 500]
    for path in ("/v1/chat/completions", "/v1/completions", "/process", "/tokenize"):
        assert statuses[path, 200] > 20, statuses
        assert statuses[path, 400] > 20, statuses
