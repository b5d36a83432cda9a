"""The chat server of a thousand tutorials: the baseline of the benchmark.

    python tutorial.py 55555

It is written out here as it is usually taught, faults included, because they
are what is measured: bytes are passed on as `recv(1024)` happens to cut them,
every sender's thread sends to every client itself and waits for the slowest,
and a newcomer who says nothing keeps everybody else at the door. Only the
address is an argument and the types are written down.
"""

import socket
import sys
import threading

clients: list[socket.socket] = []
nicknames: list[str] = []


def broadcast(message: bytes) -> None:
    for client in clients:
        client.send(message)


def handle(client: socket.socket) -> None:
    while True:
        try:
            message = client.recv(1024)
            broadcast(message)
        except OSError:
            index = clients.index(client)
            clients.remove(client)
            client.close()
            nickname = nicknames[index]
            broadcast(f"{nickname} left!".encode("ascii"))
            nicknames.remove(nickname)
            break


def receive(server: socket.socket) -> None:
    while True:
        client, address = server.accept()
        print(f"connected with {address}", file=sys.stderr)

        client.send("NICK".encode("ascii"))
        nickname = client.recv(1024).decode("ascii")
        nicknames.append(nickname)
        clients.append(client)

        broadcast(f"{nickname} joined!".encode("ascii"))
        client.send("Connected to server!".encode("ascii"))

        thread = threading.Thread(target=handle, args=(client,))
        thread.start()


def main() -> None:
    host, port = "127.0.0.1", int(sys.argv[1])
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, port))
    server.listen()
    print(f"listening on {host}:{port}", file=sys.stderr, flush=True)
    receive(server)


if __name__ == "__main__":
    main()
