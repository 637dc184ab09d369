"""Operations without a server: their steps run against a script of replies.

No test but this module looks into a :class:`Step`.
"""

import hiredis

from ff_fast._core.steps import Pause
from ff_fast.errors import FFError

BLOCKING = (b"BZMPOP", b"BLOCK")


def request_of(step):
    """What a step sends, packed."""
    return step.request


def block_of(step):
    """How long it lets the server block, in seconds."""
    return step.block_s


def words(request):
    """The commands of a packed request, each as the list of its words."""
    reader = hiredis.Reader()
    reader.feed(request)
    commands = []
    while (command := reader.gets()) is not False:
        commands.append(command)
    return commands


def run(steps, replies=(), pause=lambda seconds: None):
    """Run *steps*; return what they asked for, and their value or the ``FFError`` that ended them.

    Args:
        steps: The generator of an operation.
        replies: One for each command, in order; all are used. An ``FFError`` stands for a connection that fails
            before the reply, so that the other replies of its step are not used.
        pause: Called with the seconds of each :class:`Pause`.
    """
    replies = iter(replies)
    asked = []
    answer, failure = None, None
    try:
        while True:
            step = steps.send(answer) if failure is None else steps.throw(failure)
            answer, failure = [], None
            if isinstance(step, Pause):
                asked.append(step)
                pause(step.seconds)
                continue
            commands = words(request_of(step))
            assert len(commands) == len(step.commands)
            assert (block_of(step) > 0) == any(word in BLOCKING for c in commands for word in c)
            asked += commands
            for command in commands:
                reply = next(replies, EOFError)
                assert reply is not EOFError, f"no reply to {command}"
                if isinstance(reply, FFError):
                    failure = reply
                    break
                answer.append(reply)
    except StopIteration as stop:
        value = stop.value
    except FFError as error:
        value = error
    left = list(replies)
    assert not left, f"nobody asked for {left}"
    return asked, value


def call(op):
    """The words of a call."""
    (command,) = words(op.command().request)
    return command


def functions(asked):
    """What was asked for in short: the function of each call, the name of any other command."""
    return [
        "pause"
        if isinstance(each, Pause)
        else (each[1] if each[0][:5] == b"FCALL" else each[0]).decode()
        for each in asked
    ]
