"""From what a command raises to an exit code and a line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pws._error_messages import frames_of_others, message_of
from pws._errors import ToldElsewhereError, reason_of
from pws.cli.output import guarded_output
from pws.cli.process import process_as_found


def exit_code_of(work: Callable[[], int], program: str, goes_on: str = "") -> int:
    """Do `work`; 2 where bad input or the machine made it fail, 130 where it was interrupted, else what it returns.

    Args:
        work: the command.
        program: whose name begins the line on stderr.
        goes_on: how to go on with an interrupted command, if there is a way.
    """
    with process_as_found(), guarded_output() as output:
        code = _checked(work, program, goes_on)
        output.flush()
        if output.error is not None and not isinstance(
            output.error, BrokenPipeError
        ):  # a reader like head has all it wants
            said = f"the output can't be written: {output.error.strerror}; the work itself is done"
            code = code or _fail(program, said, 2)
    return code


def _checked(work: Callable[[], int], program: str, goes_on: str) -> int:
    try:
        return work()
    except KeyboardInterrupt:
        return _fail(program, f"interrupted{goes_on}", 130)
    except ToldElsewhereError:
        return 2
    except (Exception, SystemExit) as error:
        frames, message = frames_of_others(error), message_of(error)
        if message is None and not frames:
            raise
        for frame in frames:
            print(frame, file=sys.stderr)
        return _fail(program, message or f"the code above, which is not of pws, failed: {reason_of(error)}.", 2)


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return code
