"""Processes that work together, and end together: each notices at once when another is gone, whatever it is doing."""

import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers.utils import logging

from .files import held


logger = logging.get_logger(__name__)
FAREWELL = b"\0"  # of a process that is done; anything else is a sentence on why it is not
GREETING = struct.Struct("!16sI")  # a secret, and the number of the process
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds: finds hosts that are gone
SECONDS_TO_MEET = 600  # of processes that are started together
SECONDS_TO_TELL = 2
PRESENT, ABSENT = "present", "absent"
JOB_NAMES = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "TORCHELASTIC_RUN_ID")
SECONDS_TO_CONNECT = 30
SECONDS_TO_FAIL = 5  # where another process has failed: most mistakes are everybody's, and are best told by oneself
LONGEST_WAIT = timedelta(days=7)  # of one process for another; see `ending_together` for those that are gone
# What `accelerate launch` asks for in the environment and this package does not do, and the remedy.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "trainings take `--use_fsdp --fsdp_version 2`, which shards as ZeRO does",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "trainings take `--use_fsdp --fsdp_version 2`"),
}
_watches: list["Watch"] = []


class Stopped(KeyboardInterrupt):
    """Ctrl-C, upon which all processes have agreed to end."""


def open_state() -> PartialState:
    """
    The processes that `accelerate launch` or `torchrun` started, this one among them.

    Raises:
        ValueError: they do not know of each other, have no place to meet, or were started for what is not supported.
        SystemExit: some of them have not come within `SECONDS_TO_MEET`.
    """
    check_launcher(REFUSED)
    group = _meet()
    # Without an accelerator, accelerate must be told so, or torchrun's processes do not know of each other.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=LONGEST_WAIT, **group)
    if group:
        group["store"].set_timeout(LONGEST_WAIT)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but accelerate sees {state.num_processes}: each would do all of the "
            "work. Configure it with `accelerate config`, or start them with torchrun."
        )
    return state


def check_launcher(refused: Mapping[str, tuple[str, str]]) -> None:
    """
    Args:
        refused: by variables of the environment, what they ask for, and the remedy.

    Raises:
        ValueError: it is asked for.
    """
    for variable, (name, remedy) in refused.items():
        if parse_flag_from_env(variable):
            raise ValueError(f"`accelerate launch` asks for {name}, which is not supported here: {remedy}.")


def _meet() -> dict[str, Any]:
    """
    Waits for all processes that the environment announces, and returns what their group is made of: the store at which
    they have met, and the number of this one. Nothing if it announces none, or they are a group already.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
    if not all(map(os.environ.get, (*names, "MASTER_ADDR"))) or torch.distributed.is_initialized():
        return {}
    rank, size, port = (int(os.environ[name]) for name in names)
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)  # else torchrun is
    store = _open_store(os.environ["MASTER_ADDR"], port, size, is_host)
    missing = [0] if store is None else _missing(store, rank, size)
    if not missing:
        return {"store": store, "rank": rank, "world_size": size}
    if is_host:
        time.sleep(SECONDS_TO_TELL)
    named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    raise SystemExit(
        f"Of {size} processes, these did not come within {SECONDS_TO_MEET} seconds: {named}. Process {rank} ends as "
        "well: see why they did not start, and start all again."
    )


def _open_store(host: str, port: int, size: int, is_host: bool) -> Any:
    """
    Where processes meet: of this attempt of the job that the environment numbers, since others may come to its port.
    None if nobody is there.
    """
    from torch.distributed import DistNetworkError, PrefixStore, TCPStore  # not in every build

    patience = timedelta(seconds=SECONDS_TO_MEET)
    try:
        store = TCPStore(host, port, size, is_host, patience, wait_for_workers=False, multi_tenant=True)
    except DistNetworkError as error:
        if is_host:
            raise ValueError(
                f"The environment's MASTER_ADDR and MASTER_PORT are {host} and {port}, where the main process cannot "
                f"listen ({error}); they must be its own host and a free port there: set another MASTER_PORT, for "
                "all processes."
            ) from error
        return None
    job = "/".join(os.environ.get(name, "") for name in (*JOB_NAMES, "TORCHELASTIC_RESTART_COUNT"))
    return PrefixStore(f"cdm_diffusers/{job}", store)


def _missing(store: Any, rank: int, size: int) -> list[int]:
    """The processes that have not come when all others have, or have waited for `SECONDS_TO_MEET`."""
    from torch.distributed import DistNetworkError, DistStoreError

    keys = [f"process {process}" for process in range(size)]
    try:
        store.compare_set(keys[rank], "", PRESENT)
        with suppress(DistStoreError):
            store.wait(keys, timedelta(seconds=SECONDS_TO_MEET))
        states = [store.compare_set(key, "", ABSENT).decode() for key in keys]  # which ends the wait of the others
    except DistNetworkError:
        return [0]
    return [process for process, state in enumerate(states) if state == ABSENT]


@contextmanager
def ending_together(
    state: PartialState, advice: Callable[[], str] = lambda: "Start the command again."
) -> Iterator[None]:
    """
    Around what all processes of `state` do together, long waits included. Where one of them is killed, or fails, in
    the block, all others end within seconds, by exit code 1 and a sentence on stderr.

    Each process is connected to the main process. The kernel closes the connection of a process that is killed, so
    that none has to show signs of life; the main process tells the others.

    Args:
        advice: says what to do then.
    """
    if state.num_processes == 1 or _watches:
        yield
        return
    watch = Watch(state, advice)
    _watches.append(watch)
    try:
        yield
    except (SystemExit, Stopped):  # asked for, and agreed upon
        watch.leave(FAREWELL)
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    else:
        watch.leave(FAREWELL)
    finally:
        _watches.remove(watch)


@contextmanager
def held_by_main(state: PartialState, folder: Path, task: str) -> Iterator[None]:
    """A folder that is [`held`] by the main process; where that is refused, all processes are."""
    with ExitStack() as stack:
        from_main(lambda: stack.enter_context(held(folder, task)))
        yield


def from_main(function: Callable[[], Any]) -> Any:
    """
    What `function` returns in the main process, which alone calls it, for all processes. All must call this.

    Raises:
        OSError, ValueError: in all processes, where it does in the main process.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [function(), None]
        except (OSError, ValueError) as error:
            outcome = [None, error]
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def largest(value: int, group: "torch.distributed.ProcessGroup | None") -> int:
    """The largest of all processes' values; `group` is theirs on the host, None for a single one. All must call it."""
    if group is None:
        return value
    values = torch.tensor(int(value))
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group)
    return values.item()


class Watch:
    """This process's connections to others, and a thread that listens to them."""

    def __init__(self, state: PartialState, advice: Callable[[], str]):
        self.name, self.count, self.advice = f"Process {state.process_index}", state.num_processes, advice
        self.links = _connect(state)
        self.verdict: str | None = None  # on the first process that is gone
        self.judged, self.left, self.ending = threading.Event(), threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def fail(self, error: BaseException) -> None:
        """Tells the others; ends this process if the error is a consequence of another one's end."""
        could_follow = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if could_follow and self.judged.wait(1):
            self._end()
        self.leave(f"{self.name} of {self.count} has failed ({type(error).__name__}: {error})".encode())

    def leave(self, last_word: bytes) -> None:
        """Ends the watch."""
        self.left.set()
        self._tell(last_word)
        self.thread.join(2)
        for link in self.links.values():
            link.close()

    def _tell(self, word: bytes) -> None:
        for link in self.links.values():
            with suppress(OSError):  # it is gone itself
                link.sendall(word)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while not self.left.is_set() and selector.get_map():
                for key, _ in selector.select(0.2):
                    word = _received(key.fileobj)
                    if word == FAREWELL:
                        selector.unregister(key.fileobj)
                    else:
                        self._judge(word, key.data)
                        return

    def _judge(self, word: bytes, rank: int) -> None:
        killed = f"Process {rank} of {self.count} was killed, or has crashed"
        self.verdict = word.decode(errors="replace") or killed
        self.judged.set()
        if not self.left.wait(SECONDS_TO_FAIL if word else 0):
            self._end()

    def _end(self) -> NoReturn:
        self.ending.acquire()  # for good
        try:
            self._tell(self.verdict.encode())
            advice = ""
            with suppress(Exception):
                advice = self.advice()
            # In one write, since progress bars of other threads go on.
            sys.stderr.write(f"\n{self.verdict}: {self.name.lower()} ends as well. {advice}\n")
            sys.stderr.flush()
        finally:
            os._exit(1)


def _received(link: socket.socket) -> bytes:
    """What has come; nothing from a process that is gone."""
    try:
        return link.recv(1 << 16)
    except OSError:
        return b""


def _connect(state: PartialState) -> dict[int, socket.socket]:
    """
    Connects the main process with each of the others; sockets by process number. A process that cannot be reached is
    not watched.
    """
    server, port, links = None, None, {}
    try:
        if state.is_main_process:
            server, port = _serve(state.num_processes)
        port, secret = broadcast_object_list([port, secrets.token_bytes(16)])
        if isinstance(port, OSError):
            raise port
        if server is not None:
            with server:
                _accept(server, links, secret, state.num_processes - 1)
        else:
            links[0] = socket.create_connection((os.environ["MASTER_ADDR"], port), SECONDS_TO_CONNECT)
            links[0].sendall(GREETING.pack(secret, state.process_index))
    except OSError as error:  # which time-outs are
        logger.warning(f"Process {state.process_index} may not notice that others end: no connection ({error}).")
    for link in links.values():
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return links


def _serve(backlog: int) -> tuple[socket.socket, int] | tuple[None, OSError]:
    """A socket that listens, and its port; or why there is none."""
    try:
        server = socket.create_server(("", 0), backlog=backlog)
    except OSError as error:
        return None, error
    return server, server.getsockname()[1]


def _accept(server: socket.socket, links: dict[int, socket.socket], secret: bytes, count: int) -> None:
    end = time.monotonic() + SECONDS_TO_CONNECT
    while len(links) < count:
        server.settimeout(max(0.1, end - time.monotonic()))
        link, _ = server.accept()
        link.settimeout(1)
        with suppress(OSError):
            greeting = link.recv(GREETING.size, socket.MSG_WAITALL)
            if len(greeting) == GREETING.size and greeting.startswith(secret):
                links[GREETING.unpack(greeting)[1]] = link
                continue
        link.close()


def _leave_to_parent() -> None:
    """A forked process, such as a data loader's, keeps no connection open when the one that made it is killed."""
    for watch in _watches:
        for link in watch.links.values():
            link.close()
    _watches.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
