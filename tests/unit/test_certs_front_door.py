"""The configuration that nginx is given as the front door; what it does is shown by tests/e2e/test_front_door.py."""

import pytest

from common.errors import UserError
from common.system.certs import ServerFiles
from server.flower.front_door import Door, door_config


def test_paths_that_nginx_cannot_take_are_refused_in_one_line(tmp_path):
    files = {name: tmp_path / "a$b" / name for name in ("ca", "certificate", "key", "clients")}
    with pytest.raises(UserError, match="nginx takes no path with"):
        door_config(Door(host="127.0.0.1", port=1, superlink_port=2, tls=ServerFiles(**files)))


def test_with_tls_it_encrypts_to_either_side_and_verifies_the_superlink(tmp_path):
    files = {name: tmp_path / name for name in ("ca", "certificate", "key", "clients")}
    text = door_config(Door(host="::", port=443, superlink_port=2, superlink_host="::1", tls=ServerFiles(**files)))
    assert "server [::1]:2;" in text
    assert "listen [::]:443 ssl;" in text
    assert "proxy_pass https://superlink;" in text
    assert "proxy_ssl_verify on;" in text
    assert f'proxy_ssl_trusted_certificate "{files["ca"]}";' in text
