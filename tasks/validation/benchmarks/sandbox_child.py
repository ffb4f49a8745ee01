"""The process that a generated program runs in: it gives up what it could do harm with, then runs the program.

Run as a script by sandbox.py, which writes a request to its standard input and reads the answer from its standard
output. Standard library only, so that it starts quickly and imports nothing of ours.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
RETURN_ALLOW, RETURN_ERRNO, RETURN_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, GREATER_OR_EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
REFUSED = RETURN_ERRNO | errno.EPERM
CLONE_THREAD = 0x00010000
SIGNALLING = (8, 10, 15, 1024, 1026)  # fcntl's F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

OPENS = {"open": 1, "openat": 2}  # which argument holds the flags
WRITES = ("mkdir", "mkdirat", "rename", "renameat", "renameat2", "rmdir", "unlink", "unlinkat")
BY_ARGUMENT = ("clone", "fcntl", *OPENS)
ANSWERED = {"clone3": errno.ENOSYS, "openat2": errno.ENOSYS, "ioctl": errno.ENOTTY}

ALLOWED: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
            "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
            "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
            "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "mincore": 27, "madvise": 28, "dup": 32,
            "dup2": 33, "nanosleep": 35, "setitimer": 38, "getpid": 39, "clone": 56, "exit": 60, "uname": 63,
            "fcntl": 72, "flock": 73, "fsync": 74, "ftruncate": 77, "getcwd": 79, "chdir": 80, "rename": 82,
            "mkdir": 83, "rmdir": 84, "unlink": 87, "readlink": 89, "umask": 95, "gettimeofday": 96, "getrlimit": 97,
            "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
            "getegid": 108, "getppid": 110, "getpgrp": 111, "getresuid": 118, "getresgid": 120, "getpgid": 121,
            "getsid": 124, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
            "statfs": 137, "fstatfs": 138, "sched_getparam": 143, "sched_getscheduler": 145, "arch_prctl": 158,
            "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
            "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228,
            "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233,
            "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267,
            "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281,
            "timerfd_create": 283, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
            "renameat2": 316, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
            "clone3": 435, "close_range": 436, "openat2": 437, "faccessat2": 439,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23,
            "dup3": 24, "fcntl": 25, "ioctl": 29, "flock": 32, "mkdirat": 34, "unlinkat": 35, "renameat": 38,
            "statfs": 43, "fstatfs": 44, "ftruncate": 46, "faccessat": 48, "chdir": 49, "openat": 56, "close": 57,
            "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
            "pread64": 67, "pwrite64": 68, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79,
            "fstat": 80, "fsync": 82, "timerfd_create": 85, "exit": 93, "exit_group": 94, "set_tid_address": 96,
            "futex": 98, "set_robust_list": 99, "nanosleep": 101, "setitimer": 103, "clock_gettime": 113,
            "clock_getres": 114, "clock_nanosleep": 115, "sched_getscheduler": 120, "sched_getparam": 121,
            "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132,
            "rt_sigsuspend": 133, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigpending": 136,
            "rt_sigtimedwait": 137, "rt_sigreturn": 139, "getresuid": 148, "getresgid": 150, "times": 153,
            "getpgid": 155, "getsid": 156, "uname": 160, "getrlimit": 163, "getrusage": 165, "umask": 166,
            "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
            "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "clone": 220,
            "mmap": 222, "fadvise64": 223, "mprotect": 226, "mincore": 232, "madvise": 233,
            "renameat2": 276, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "clone3": 435,
            "close_range": 436, "openat2": 437, "faccessat2": 439,
        },
    ),
}  # fmt: skip
"""By machine: what the kernel calls it (AUDIT_ARCH), and the numbers of the calls that computing, reading files,
waiting and threads take; all else answers EPERM."""


def build_filter(machine: str, *, may_write: bool) -> bytes:
    """The program of the seccomp filter, in classic BPF (linux/filter.h).

    Some calls are allowed by their arguments: `clone` of threads only; files opened for writing with `may_write` only
    (Landlock then says where); `fcntl` but for what sends signals. `clone3` and `openat2`, whose arguments a filter
    cannot see, answer ENOSYS, so that the C library takes the older ones; and nothing is a terminal for `ioctl`.
    """
    architecture, numbers = ALLOWED[machine]
    apart = {*BY_ARGUMENT, *ANSWERED} - (OPENS.keys() if may_write else set()) | (set() if may_write else {*WRITES})
    code = [
        (LOAD, 0, 0, 4),  # architecture
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, RETURN_KILL_PROCESS),
        (LOAD, 0, 0, 0),  # number of the call
        (GREATER_OR_EQUAL, 0, 1, 0x40000000),  # x86-64's x32, which counts the same calls from there
        (RETURN, 0, 0, RETURN_KILL_PROCESS),
    ]
    for name, number in numbers.items():
        if name not in apart:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, RETURN_ALLOW)]
    for name, error in ANSWERED.items():
        code += [(EQUAL, 0, 1, numbers[name]), (RETURN, 0, 0, RETURN_ERRNO | error)]
    code += _by_argument(numbers["clone"], 0, [(ANY_BIT, CLONE_THREAD)], allowed=True)
    code += _by_argument(numbers["fcntl"], 1, [(EQUAL, command) for command in SIGNALLING], allowed=False)
    if not may_write:
        for name, place in OPENS.items():
            if name in numbers:
                code += _by_argument(numbers[name], place, [(ANY_BIT, WRITING)], allowed=False)
    code.append((RETURN, 0, 0, REFUSED))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _by_argument(
    number: int, argument: int, tests: list[tuple[int, int]], *, allowed: bool
) -> list[tuple[int, int, int, int]]:
    """The call `number` is `allowed` where a test holds of the lower half of its argument, else the opposite."""
    ends = (RETURN_ALLOW, REFUSED) if allowed else (REFUSED, RETURN_ALLOW)
    code = [(LOAD, 0, 0, 16 + 8 * argument)]
    for code_of_test, value in tests:
        code += [(code_of_test, 0, 1, value), (RETURN, 0, 0, ends[0])]
    code.append((RETURN, 0, 0, ends[1]))
    return [(EQUAL, 0, len(code), number), *code]


def _confine(limits: dict[str, Any]) -> str:
    """Gives up everything; returns where files can still be written.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: Any, *arguments: Any) -> int:
        result: int = function(*arguments)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    parent = os.getppid()
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    call(libc.prctl, PR_SET_DUMPABLE, 0, 0, 0, 0)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    may_write = _write_only_here(libc, call)
    memory, file = limits["memory_mib"] * 2**20, limits["file_mib"] * 2**20
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))  # SIGXCPU, then SIGKILL
    code = build_filter(os.uname().machine, may_write=may_write)
    block = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(block))
    call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program), 0, 0)
    return "own directory" if may_write else "nowhere"


def _write_only_here(libc: Any, call: Any) -> bool:
    """Lets files change in the working directory only, by Landlock; False where the kernel cannot.

    From version 3 on (Linux 6.2): before, it does not see a file that is opened to be emptied.
    """
    create, add, restrict = 444, 445, 446  # the same numbers on all machines
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 3:
        return False
    changes = (1 << 1) | sum(1 << bit for bit in range(4, 15))  # write; remove, make, refer, truncate
    ruleset = call(libc.syscall, create, ctypes.create_string_buffer(struct.pack("Q", changes)), ctypes.c_size_t(8), 0)
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", changes, here))
    call(libc.syscall, add, ruleset, 1, rule, 0)
    call(libc.syscall, restrict, ruleset, 0)
    os.close(here)
    os.close(ruleset)
    return True


def main() -> None:
    """Read the request, confine this process, run the program, answer."""
    request = json.loads(sys.stdin.buffer.read())
    program, secret = request.pop("program"), request.pop("secret")
    answers = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)

    def answer(**said: Any) -> None:
        os.write(answers, json.dumps({"secret": secret, **said}).encode())

    try:
        writes = _confine(request)
    except (OSError, ValueError) as error:
        answer(unconfined=str(error))
        os._exit(1)
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})  # noqa: S102 that is what it is for
    except BaseException as error:  # noqa: BLE001 - whatever it is, it has not passed
        try:
            answer(raised=f"{type(error).__name__}: {error}"[:300], writes=writes)
        except BaseException:  # noqa: BLE001 - its own exception may fail to be written
            os._exit(1)
        os._exit(1)
    answer(passed=True, writes=writes)
    os._exit(0)


if __name__ == "__main__":
    main()
