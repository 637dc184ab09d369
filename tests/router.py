"""A plain client of a cluster, for looking at what was stored and for breaking things on purpose."""

import itertools

import redis

from ff_fast import keys

# Where the first key stands; for any other command with a key it is the first argument.
_SECOND = {"OBJECT", "MEMORY", "XINFO", "XGROUP", "BITOP"}
_KEYLESS = {
    *("ACL", "BGREWRITEAOF", "BGSAVE", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "DBSIZE", "ECHO"),
    *(
        "FLUSHALL",
        "FLUSHDB",
        "FUNCTION",
        "INFO",
        "KEYS",
        "LASTSAVE",
        "LATENCY",
        "MODULE",
        "MONITOR",
    ),
    *("PING", "PUBLISH", "REPLICAOF", "ROLE", "SAVE", "SCRIPT", "SHUTDOWN", "SLOWLOG", "TIME"),
    *("WAIT", "WAITAOF", "ASKING", "READONLY", "READWRITE", "SWAPDB", "SCAN"),
}
_OF_MANY_KEYS = {"DEL", "EXISTS", "UNLINK", "TOUCH"}


def first_key(args):
    """The first key of a command, None if it has none."""
    name = str(args[0]).upper()
    words = name.split()
    args = [*words, *args[1:]]
    name = words[0]
    if name in {"FCALL", "FCALL_RO", "EVAL", "EVALSHA"}:
        return args[3] if int(args[2]) else None
    if name in {"XREAD", "XREADGROUP"}:
        places = [i for i, word in enumerate(args) if str(_text(word)).upper() == "STREAMS"]
        return args[places[0] + 1]
    if name == "PUBSUB":
        return args[2] if len(args) > 2 and args[1].upper() == "SHARDNUMSUB" else None
    if name == "DEBUG":
        return args[2] if args[1].upper() in {"OBJECT", "LISTPACK"} else None
    if name in _KEYLESS or len(args) < 2:
        return None
    return args[2] if name in _SECOND else args[1]


def _text(word):
    return word.decode("latin-1") if isinstance(word, bytes) else word


def slot_of(key):
    return keys.key_slot(key if isinstance(key, bytes) else str(key).encode())


def node_of(raw, key):
    """The client of the server that has a key."""
    return raw.node_of(key) if isinstance(raw, Router) else raw


def delete(raw, names):
    """Delete keys, in one request to each server that has some."""
    if not isinstance(raw, Router):
        raw.delete(*names)
        return
    for node, its in raw.by_node(names).items():
        with node.pipeline(transaction=False) as pipe:
            for name in its:
                pipe.delete(name)
            pipe.execute()


class Router(redis.Redis):
    """Sends a command to the node that has its key, and one without a key to all nodes.

    Of several replies lists are joined, numbers are added, and of anything else the first one is returned.

    Args:
        nodes: A client of each node.
    """

    def __init__(self, nodes):
        super().__init__(connection_pool=nodes[0].connection_pool)
        self.nodes = nodes
        self._owners = {}
        self.learn()

    def learn(self):
        """Ask where the slots are."""
        by_port = {
            client.connection_pool.connection_kwargs["port"]: client for client in self.nodes
        }
        for first, last, owner, *_ in self.nodes[0].execute_command("CLUSTER SLOTS"):
            self._owners |= dict.fromkeys(range(first, last + 1), by_port.get(owner[1]))

    def node_of(self, key):
        """Client of the node that has a key."""
        return self._owners[slot_of(key)]

    def by_node(self, names):
        """Keys by the client of their node."""
        found = {}
        for name in names:
            found.setdefault(self.node_of(name), []).append(name)
        return found

    def execute_command(self, *args, **options):
        key = first_key(args)
        if key is None:
            return _joined([node.execute_command(*args, **options) for node in self.nodes])
        if args[0] in _OF_MANY_KEYS and len(args) > 2:
            return sum(self.execute_command(args[0], each) for each in args[1:])
        try:
            return self.node_of(key).execute_command(*args, **options)
        except redis.exceptions.MovedError:
            self.learn()
            return self.node_of(key).execute_command(*args, **options)

    def scan_iter(self, *args, **options):
        return itertools.chain(*(node.scan_iter(*args, **options) for node in self.nodes))

    def pipeline(self, transaction=True, shard_hint=None):
        return _Pipeline(self, transaction)

    def pubsub(self, **options):
        return _PubSub(self, options)

    def close(self):
        for node in self.nodes:
            node.close()


def _joined(replies):
    first = replies[0]
    if isinstance(first, list):
        return list(itertools.chain(*replies))
    if isinstance(first, dict):
        names = dict.fromkeys(itertools.chain(*replies))
        return {
            name: _joined([reply[name] for reply in replies if name in reply]) for name in names
        }
    if isinstance(first, int | float) and not isinstance(first, bool):
        return sum(replies)
    return first


class _Pipeline(redis.client.Pipeline):
    """One node's own pipeline if all commands go there; else one command after the other."""

    def __init__(self, router, transaction):
        super().__init__(router.connection_pool, router.response_callbacks, transaction, None)
        self._router = router

    def execute(self, raise_on_error=True):
        stack, self.command_stack = self.command_stack, []
        owners = {self._router.node_of(key) for args, _ in stack if (key := first_key(args))}
        if len(owners) == 1 and all(first_key(args) for args, _ in stack):
            pipe = owners.pop().pipeline(transaction=self.transaction)
            for args, options in stack:
                pipe.execute_command(*args, **options)
            return pipe.execute(raise_on_error)
        return [self._router.execute_command(*args, **options) for args, options in stack]

    execute_command = redis.client.Pipeline.pipeline_execute_command


class _PubSub:
    """A subscription on the node of its channels, which are in one slot."""

    def __init__(self, router, options):
        self._router = router
        self._options = options
        self._pubsub = None

    def ssubscribe(self, *channels, **handlers):
        if self._pubsub is None:
            first = [*channels, *handlers][0]
            self._pubsub = self._router.node_of(first).pubsub(**self._options)
        return self._pubsub.ssubscribe(*channels, **handlers)

    def get_message(self, *args, **options):
        return self._pubsub.get_message(*args, **options)

    def listen(self):
        return self._pubsub.listen()

    def close(self):
        if self._pubsub is not None:
            self._pubsub.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
