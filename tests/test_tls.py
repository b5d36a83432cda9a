"""Inside TLS the room is the same room, and whoever does not fit is told in one line."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chat import (
    DEADLINE,
    Peer,
    close_peers,
    no_leaks,
    run_briefly,
    run_chat,
    run_server,
    wait_until,
)
from clients import Shown, flush, say, start
from proxy import RESET, Proxy
from trust import Certificate, OneAtATime, TlsPeer, ended, make_certificate, openssl

import client
from client import ChatClient
from server import ChatServer


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """The room's certificate, for 127.0.0.1."""
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def room(certificate: Certificate) -> Iterator[ChatServer]:
    """An empty room inside TLS."""
    with run_chat(tls=certificate.server()) as chat_server:
        yield chat_server


@contextlib.contextmanager
def chatting_inside(
    port: int, name: str, certificate: Certificate
) -> Iterator[tuple[ChatClient, Shown]]:
    """Be in the room by way of TLS."""
    shown = Shown()
    chat = ChatClient(name, port=port, tls=certificate.client(), show=shown)
    chat.connect()
    chat.start()
    try:
        yield chat, shown
    finally:
        chat.leave()


# --- Who vouches -------------------------------------------------------------


def test_client_that_trusts_the_authority_talks(room: ChatServer, certificate: Certificate) -> None:
    """With --tls-ca a client talks inside TLS and leaves with status 0."""
    done = say("hello\n", "--name", "alice", "--tls-ca", str(certificate.file), port=room.port)
    assert done.returncode == 0, done.stderr
    assert "alice: hello" in done.stdout.splitlines()


@pytest.mark.parametrize("form", ["AA:BB", "aabb"])
def test_client_that_knows_the_fingerprint_talks(certificate: Certificate, form: str) -> None:
    """The fingerprint that the server logs, with colons or without, is all a client needs."""
    with run_server(*certificate.options()) as chat_server:
        told = chat_server.expect_log(r"fingerprint ([0-9A-F:]{95})\n")[1]
        assert told == certificate.fingerprint()
        given = told if form == "AA:BB" else told.replace(":", "").lower()
        port = chat_server.port
        done = say("hello\n", "--name", "alice", "--tls-fingerprint", given, port=port)
        assert done.returncode == 0, done.stderr
        assert "alice: hello" in done.stdout.splitlines()


def complaint(port: int, *options: str, status: int = 1) -> str:
    """Run a client that is not to get in; return the one line that it ends with."""
    done = say("hello\n", "--name", "alice", *options, port=port)
    assert done.returncode == status, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("client.py: ")
    return lines[0]


def test_wrong_fingerprint_is_refused(room: ChatServer, certificate: Certificate) -> None:
    """A client that was given another fingerprint says which it saw, and says nothing else."""
    line = complaint(room.port, "--tls-fingerprint", "00" * 32)
    assert certificate.fingerprint() in line
    assert room.history.last(10) == []


@pytest.mark.parametrize("given", ["", "abc", "0g" * 32, "00" * 31, "00" * 33])
def test_malformed_fingerprint_is_wrong_usage(given: str) -> None:
    """What cannot be a fingerprint is refused before anything is tried."""
    done = say("", "--name", "alice", "--tls-fingerprint", given, port=1)
    assert done.returncode == 2
    assert "not a fingerprint of 64 hex digits" in done.stderr


def test_untrusted_certificate_is_refused(room: ChatServer) -> None:
    """A certificate that nobody vouches for is refused, with what to do about it."""
    line = complaint(room.port, "--tls")
    assert "not trusted" in line
    assert "--tls-ca" in line
    assert "--tls-fingerprint" in line
    assert room.history.last(10) == []


def test_certificate_for_another_host_is_refused(tmp_path: Path) -> None:
    """A trusted certificate of another host is refused."""
    other = make_certificate(tmp_path, "DNS:chat.example")
    with run_chat(tls=other.server()) as chat_server:
        line = complaint(chat_server.port, "--tls-ca", str(other.file))
        assert "not trusted" in line
        assert "127.0.0.1" in line
        assert line.endswith(
            "; give --host a name that is in it, or name it itself with --tls-fingerprint"
        )


def test_authority_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A file of authorities that is missing or holds none is named in one line."""
    missing, empty = tmp_path / "missing.pem", tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    assert str(empty) in complaint(1, "--tls-ca", str(empty))
    assert str(missing) in complaint(1, "--tls-ca", str(missing))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_refused(certificate: Certificate) -> None:
    """The server speaks TLS 1.2 and 1.3, and nothing older with a client that knows no better."""
    old, now = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1), ssl.TLSVersion.TLSv1_2
    with run_server(*certificate.options()) as chat_server:
        for version in (*old, now, ssl.TLSVersion.TLSv1_3):
            context = certificate.client()
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version
            allowed = contextlib.nullcontext()
            refused = pytest.raises(OSError, match=r"(?i)ssl|reset")
            with (
                socket.create_connection(("127.0.0.1", chat_server.port), DEADLINE) as sock,
                refused if version in old else allowed,
                context.wrap_socket(sock, server_hostname="127.0.0.1") as inside,
            ):
                assert inside.recv(100) == b"NICK\n"


# --- Plain and not -----------------------------------------------------------


def test_plain_client_at_a_tls_port(room: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    """Plain text on a TLS port is answered with one plain line, logged, and counted."""
    caplog.set_level("INFO", "chat")
    nobody = Peer(room.port)
    nobody.send("hello")
    assert nobody.rest() == ["-> this chat speaks TLS; connect with --tls"]
    wait_until(lambda: "no TLS" in caplog.text, "the log")
    room.refusals.tell()
    assert "refused in the last minute: no TLS (1)" in caplog.messages


def test_plain_client_that_waits_at_a_tls_port(certificate: Certificate) -> None:
    """A plain client that says nothing is told at the deadline that the chat speaks TLS."""
    with run_chat(tls=certificate.server(), name_deadline=0.2) as chat_server:
        assert Peer(chat_server.port).rest() == ["-> this chat speaks TLS; connect with --tls"]
        assert "--tls" in complaint(chat_server.port)


def test_tls_client_at_a_plain_port(caplog: pytest.LogCaptureFixture) -> None:
    """A client that wants TLS where there is none says so in one line, and the server logs it."""
    caplog.set_level("INFO", "chat")
    with run_chat() as chat_server:
        line = complaint(chat_server.port, "--tls")
        assert "no TLS" in line
        assert "without --tls" in line
        wait_until(lambda: "speaks TLS" in caplog.text, "the log")
        hello = b"\x16\x03\x01\x00\x05hello"
        assert Peer(chat_server.port).send_raw(hello).rest() == [
            "NICK",
            "-> this is a chat without TLS; connect without it",
        ]


def stall(port: int, certificate: Certificate) -> list[Peer]:
    """Return peers whose handshakes do not go on: not begun, in the middle, half way through."""
    stalled = [Peer(port) for _ in range(8)]
    hello = ssl.MemoryBIO()
    half = certificate.client().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    start = hello.read()
    stalled[0].send_raw(start)  # gets the server's answer and says nothing to it
    stalled[1].send_raw(start[:50])
    return stalled


def test_stalled_handshake_delays_nobody(certificate: Certificate) -> None:
    """Mute, torn and half-done handshakes hold up nobody, however long they may take."""
    with run_chat(tls=certificate.server(), name_deadline=600.0) as chat_server:
        stall(chat_server.port, certificate)
        alice = TlsPeer(chat_server.port, certificate).join("alice")
        bob = TlsPeer(chat_server.port, certificate).join("bob")
        alice.expect("* bob joined the chat")
        for number in range(20):
            alice.send(str(number))
            alice.expect(f"alice: {number}")
            bob.expect(f"alice: {number}")


def test_stalled_handshake_ends_at_the_deadline(certificate: Certificate) -> None:
    """A handshake that does not go on is ended, at whatever step it stands."""
    with run_chat(tls=certificate.server(), name_deadline=0.3) as chat_server:
        for peer in stall(chat_server.port, certificate):
            ended(peer)
        TlsPeer(chat_server.port, certificate).join("alice")


def test_one_deadline_for_handshake_and_name(certificate: Certificate) -> None:
    """Who shakes hands and then says nothing is told that no name came in time."""
    with run_chat(tls=certificate.server(), name_deadline=0.5) as chat_server:
        peer = TlsPeer(chat_server.port, certificate)
        assert peer.rest() == ["NICK", "-> no name came in time; connect again"]


# --- Certificates that cannot be used ----------------------------------------


def refused(*options: str) -> str:
    """Start a server that must refuse what it was given; return its one line."""
    done = run_briefly("--port", "0", *options)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("server.py: ")
    return lines[0]


def test_key_that_does_not_fit_is_refused(certificate: Certificate, tmp_path: Path) -> None:
    """A certificate with the key of another is refused in one line that names it."""
    other = make_certificate(tmp_path)
    line = refused("--tls-cert", str(certificate.file), "--tls-key", str(other.key))
    assert str(certificate.file) in line


def test_key_with_a_passphrase_is_refused(tmp_path: Path) -> None:
    """A key that wants a passphrase is refused, not asked for: nobody may be there."""
    line = refused(*make_certificate(tmp_path, passphrase="secret").options())
    assert "without a passphrase" in line


@pytest.mark.parametrize("missing", ["--tls-cert", "--tls-key"])
def test_missing_file_is_named(certificate: Certificate, missing: str) -> None:
    """A certificate or a key that is not there is named."""
    options = dict(zip(*[iter(certificate.options())] * 2, strict=True))
    options[missing] = "/nowhere/file.pem"
    line = refused(*(part for pair in options.items() for part in pair))
    assert "/nowhere/file.pem" in line


def test_file_that_is_no_certificate_is_refused(tmp_path: Path) -> None:
    """A file of something else is refused in one line."""
    junk = tmp_path / "junk.pem"
    junk.write_bytes(b"\xff\xfe no certificate \x00\n" * 10)
    assert str(junk) in refused("--tls-cert", str(junk))


def test_key_without_certificate_is_refused(certificate: Certificate) -> None:
    """A key alone is a mistake that is told, not a server without TLS."""
    done = run_briefly("--port", "0", "--tls-key", str(certificate.key))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("; give that too with --tls-cert")


def test_certificate_and_key_in_one_file(certificate: Certificate, tmp_path: Path) -> None:
    """One file may hold both, the key first as well."""
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.key.read_bytes() + certificate.file.read_bytes())
    with run_server("--tls-cert", str(both)) as chat_server:
        chat_server.expect_log(re.escape(certificate.fingerprint()))
        TlsPeer(chat_server.port, certificate).join("alice")


def test_forgotten_key_is_asked_for(certificate: Certificate) -> None:
    """A certificate without a key says how to give it."""
    line = refused("--tls-cert", str(certificate.file))
    assert "--tls-key" in line
    assert str(certificate.file) in line


def test_certificate_of_another_form_is_refused(certificate: Certificate, tmp_path: Path) -> None:
    """A certificate that OpenSSL would take, but whose fingerprint cannot be told, is refused."""
    trusted = tmp_path / "trusted.pem"
    openssl("x509", "-in", str(certificate.file), "-trustout", "-out", str(trusted))
    line = refused("--tls-cert", str(trusted), "--tls-key", str(certificate.key))
    assert "PEM" in line
    assert str(trusted) in line


# --- How it ends -------------------------------------------------------------


class StrictPeer(TlsPeer):
    """A peer to which an end without a goodbye is an error."""

    def __init__(self, port: int, certificate: Certificate) -> None:
        super().__init__(port, certificate)
        vars(self.sock)["suppress_ragged_eofs"] = False

    def expect_goodbye(self) -> None:
        """Read to the end, which must be that of TLS."""
        while self.sock.recv(65536):
            pass


def test_server_says_goodbye_inside_tls(certificate: Certificate) -> None:
    """Whoever leaves, is not let in or sees the server end gets TLS's own goodbye."""
    with run_server(*certificate.options(), "--max-clients", "3") as chat_server:
        peers = [StrictPeer(chat_server.port, certificate) for _ in range(4)]
        leaving, staying, unread, late = peers
        for number, peer in enumerate(peers[:3]):
            peer.join(f"p{number}")
        late.send("late")
        late.expect_goodbye()
        leaving.send("/quit")
        leaving.expect_goodbye()
        unnamed = StrictPeer(chat_server.port, certificate)
        unnamed.expect("NICK")
        chat_server.ask_to_end()
        staying.expect_goodbye()
        unnamed.expect_goodbye()
        unread.send(*["what nobody hears"] * 100)
        unread.expect_goodbye()
        close_peers()
        assert chat_server.wait() == 0


def test_goodbye_reaches_who_is_still_talking(room: ChatServer, certificate: Certificate) -> None:
    """What a peer has sent behind its /quit is read away, and resets nothing."""
    peer = StrictPeer(room.port, certificate)
    peer.send("alice", "/quit", *["what nobody hears" * 20] * 1000)
    peer.expect_goodbye()
    socket.socket.shutdown(peer.sock, socket.SHUT_WR)
    wait_until(lambda: not room.clients, "the server to close")
    assert peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_openssl_finds_nothing_wrong_with_the_end(
    room: ChatServer, certificate: Certificate
) -> None:
    """`openssl s_client`, which calls a cut an error, has none to report."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command")
    command = ["openssl", "s_client", "-quiet", "-verify_quiet", "-CAfile", str(certificate.file)]
    done = subprocess.run(
        [*command, "-servername", "localhost", "-connect", f"127.0.0.1:{room.port}"],
        input="alice\n/quit\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.stdout.endswith("-> bye\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_client_says_goodbye_inside_tls(certificate: Certificate) -> None:
    """A client that is ended ends its TLS, and its server need not guess."""
    options = ["--name", "alice", "--tls-ca", str(certificate.file)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        with start(listener.getsockname()[1], *options) as process:
            sock, _ = listener.accept()
            sock.settimeout(DEADLINE)
            with certificate.server().wrap_socket(
                sock, server_side=True, suppress_ragged_eofs=False
            ) as inside:
                inside.sendall(b"NICK\n")
                assert inside.recv(1024).startswith(b"alice ")
                process.terminate()
                while inside.recv(1024):
                    pass
            assert process.wait(DEADLINE) == 0


def test_input_that_is_cut_costs_nobody_the_echo(
    room: ChatServer, certificate: Certificate
) -> None:
    """Whoever's input ends without TLS's goodbye still gets all that it said, every time."""
    for number in range(20):
        peer = TlsPeer(room.port, certificate)
        peer.send(f"p{number}", "one", "two")
        socket.socket.shutdown(peer.sock, socket.SHUT_WR)
        assert peer.rest()[-2:] == [f"p{number}: one", f"p{number}: two"]


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01\x00\xc8\x01", b"hello\n"])
def test_connections_reset_in_the_queue_are_nothing_to_others(
    certificate: Certificate, caplog: pytest.LogCaptureFixture, begun: bytes
) -> None:
    """However many are reset before they are accepted, inside TLS too accepting goes on."""
    with no_leaks():
        chat_server = ChatServer(port=0, tls=certificate.server())
        for _ in range(60):
            Peer(chat_server.port).send_raw(begun).vanish()
        with chat_server, ThreadPoolExecutor(1) as pool:
            alice = pool.submit(TlsPeer, chat_server.port, certificate).result()
            alice.join("alice")
            wait_until(lambda: len(chat_server.clients) == 1, "the lost ones to be forgotten")
            close_peers()
    assert "cannot accept" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_connections_reset_just_after_accept_are_nothing_to_others(
    room: ChatServer, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    """Whenever a connection is reset, it is the only one that is lost."""
    alice = TlsPeer(room.port, certificate).join("alice")
    for _ in range(100):
        Peer(room.port).vanish()
        Peer(room.port).send_raw(b"\x16\x03\x01").vanish()
    TlsPeer(room.port, certificate).join("bob")
    alice.expect("* bob joined the chat")
    wait_until(lambda: len(room.clients) == 2, "the lost ones to be forgotten")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --- Many at once ------------------------------------------------------------


PEOPLE, LINES = 60, 25


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_sixty_people_talk_both_ways_at_once(
    room: ChatServer, certificate: Certificate, turn: int
) -> None:
    """Sixty clients that send and read at once lose nothing, and all see the same order."""
    context = certificate.client()
    ready = threading.Barrier(PEOPLE, timeout=DEADLINE)

    def talk(number: int) -> list[str]:
        heard: list[str] = []
        chat = ChatClient(f"p{number}", port=room.port, tls=context)
        with chat:
            ready.wait()
            for count in range(LINES):
                chat.send(f"{count} from {number}")
            for line in chat:
                if line.name:
                    heard.append(str(line))
                if len(heard) == PEOPLE * LINES:
                    break
        assert chat.failed == 0
        return heard

    with ThreadPoolExecutor(PEOPLE) as pool:
        transcripts = list(pool.map(talk, range(PEOPLE)))
    expected = {f"p{n}: {line} from {n}" for n in range(PEOPLE) for line in range(LINES)}
    assert set(transcripts[0]) == expected
    assert len(transcripts[0]) == len(expected)
    assert all(transcript == transcripts[0] for transcript in transcripts)


def test_no_tls_socket_is_used_by_two_threads_at_once(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, writing and shaking hands on one connection never overlap, on either end."""
    watch = OneAtATime()
    for verb in ("recv", "send", "pending", "do_handshake"):
        monkeypatch.setattr(ssl.SSLSocket, verb, watch.around(getattr(ssl.SSLSocket, verb)))
    with run_chat(tls=certificate.server()) as room, contextlib.ExitStack() as stack:
        chats = [
            stack.enter_context(chatting_inside(room.port, f"p{number}", certificate))
            for number in range(4)
        ]
        for count in range(50):
            for chat, _ in chats:
                chat.send(f"line {count}")
        for chat, _ in chats:
            flush(chat)
    assert watch.calls > 50
    assert not watch.overlaps


def test_slow_reader_gets_every_byte(certificate: Certificate) -> None:
    """A reader whose buffers are full again and again gets the whole transcript right."""
    with run_chat(tls=certificate.server(), shrunken=True) as chat_server:
        alice = TlsPeer(chat_server.port, certificate).join("alice")
        bob = TlsPeer(chat_server.port, certificate, buffer=4096).join("bob")
        alice.expect("* bob joined the chat")
        transcript = []
        for number in range(2000):
            text = f"{number} {'abcdefghij' * (number % 60)}"
            alice.send(text)
            transcript.append(f"alice: {text}")
            if number % 100 == 99:
                alice.expect_eventually(transcript[-1])
                alice.send(f"/msg bob {number} {'private' * 100}")
                alice.expect(f"-> to bob: {number} {'private' * 100}")
                transcript.append(f"[from alice] {number} {'private' * 100}")
        assert bob.lines(len(transcript)) == transcript
        bob.send("caught up")
        bob.expect("bob: caught up")


def test_slow_readers_and_fast_ones_at_once(certificate: Certificate) -> None:
    """Readers of every speed see one transcript, byte for byte."""
    with run_chat(tls=certificate.server(), shrunken=True) as chat_server:
        readers = [
            TlsPeer(chat_server.port, certificate, buffer=(0, 4096)[number % 2]).join(f"r{number}")
            for number in range(6)
        ]
        alice = TlsPeer(chat_server.port, certificate).join("alice")
        texts = [f"{number} {'x' * (number * 37 % 900)}" for number in range(1500)]
        talking = threading.Thread(target=alice.send, args=texts)
        talking.start()
        with ThreadPoolExecutor(len(readers)) as pool:
            heard = pool.map(lambda peer: peer.lines_until(f"alice: {texts[-1]}"), readers)
            for lines in heard:
                assert lines[lines.index("* alice joined the chat") + 1 :] == [
                    f"alice: {text}" for text in texts
                ]
        talking.join()


def test_client_comes_back_inside_tls(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection inside TLS that breaks is made again, and nothing is lost or said twice."""
    monkeypatch.setattr(client, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(client, "RETRY_MAX", 0.05)
    with (
        run_chat(tls=certificate.server()) as chat_server,
        Proxy(chat_server.port) as proxy,
        chatting_inside(proxy.port, "alice", certificate) as (alice, alices),
        chatting_inside(chat_server.port, "bob", certificate) as (bob, bobs),
    ):
        for number in range(10):
            alice.send(f"a{number}")
            bob.send(f"b{number}")
            if number % 3 == 1:
                proxy.end(RESET)
        flush(alice)
        flush(bob)
        bob.send("over")
        alices.wait_for("bob: over")
        bobs.wait_for("bob: over")
        assert alice.failed == 0
        said = [line for line in bobs.room if not line.startswith("* ")]
        assert [line for line in alices.room if not line.startswith("* ")] == said
        for name, others in (("alice", "a"), ("bob", "b")):
            own = [line for line in said if line.startswith(f"{name}: {others}")]
            assert own == [f"{name}: {others}{number}" for number in range(10)]


def test_client_does_not_come_back_to_an_impostor(
    certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that lost its server tells nothing to one with another certificate."""
    monkeypatch.setattr(client, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(client, "RETRY_MAX", 0.05)
    impostor = make_certificate(tmp_path)
    with (
        run_chat(tls=certificate.server()) as genuine,
        ChatServer(port=0, tls=impostor.server()) as false,
        Proxy(genuine.port) as proxy,
        chatting_inside(proxy.port, "alice", certificate) as (alice, shown),
    ):
        proxy.server = false.port
        proxy.end(RESET)
        shown.wait_for("connection lost")
        alice.send("secret")
        proxy.wait_for(lambda: len(proxy.links) >= 4)
        assert false.history.last(10) == []
        proxy.server = genuine.port
        flush(alice)
        assert "alice: secret" in shown.room
