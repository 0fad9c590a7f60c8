"""What worker says of settings that it cannot work with."""

from __future__ import annotations

import pytest

from tests.cli.running import within


@pytest.mark.parametrize(("options", "words"), [
    (["--memory", "lots"], "--memory is 'lots'"), (["--tls-ca", "ca.pem"], "--tls")])
def test_what_it_cannot_work_with_is_one_line(options: list[str], words: str) -> None:
    pytest.importorskip("distributed", reason="distributed is in the extra [cluster]")
    found = within("worker", "tcp://127.0.0.1:9", *options, check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
