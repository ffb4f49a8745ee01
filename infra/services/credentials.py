"""Secrets of a home's own servers: made once, kept in a file that only its owner can read, never logged."""

import secrets
from pathlib import Path

from pydantic import BaseModel, SecretStr, field_serializer

from infra.locks import held
from infra.services.addresses import write_atomically

OWNER_ONLY = 0o600


class Credentials(BaseModel, frozen=True):
    """Who may enter the object store and the databases that `slimline up` starts."""

    s3_access_key: str
    s3_secret_key: SecretStr
    postgres_password: SecretStr

    @field_serializer("s3_secret_key", "postgres_password", when_used="json")
    def _written(self, value: SecretStr) -> str:
        return value.get_secret_value()

    def for_s3(self) -> dict[str, str | None]:
        """As boto3 reads them from the environment; what else is there belongs to other keys."""
        return {
            "AWS_ACCESS_KEY_ID": self.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_key.get_secret_value(),
            "AWS_SESSION_TOKEN": None,
        }


def credentials(home: Path) -> Credentials:
    """Of the servers of this home, the same every time."""
    file = home / "credentials.json"
    with held(home / "credentials.lock"):
        if file.exists():
            return Credentials.model_validate_json(file.read_bytes())
        made = Credentials(
            s3_access_key=secrets.token_hex(10),
            s3_secret_key=SecretStr(secrets.token_hex(20)),
            postgres_password=SecretStr(secrets.token_hex(20)),
        )
        write_atomically(file, made.model_dump_json(indent=1), OWNER_ONLY)
    return made
