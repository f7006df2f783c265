"""Flags of the weighting rules, and which of them a rule reads: the table of rules says so.

A flag that the rule does not read would change nothing, and the run would look like another than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from megatron_exact.exposure import RuleParameters, find_rule, readers
from megatron_exact.training.arguments import flag_value, has_flag


def flag_of(parameter: str) -> str:
    """The flag that sets a field of RuleParameters."""
    prefix = "" if parameter.startswith(("confidence_", "short_")) else "exact_"
    return f"--{prefix}{parameter}".replace("_", "-")


PARAMETER_OF = {flag_of(field.name): field.name for field in fields(RuleParameters)}
"""Flag -> field of RuleParameters."""


def unread_flags(rule: str) -> tuple[str, ...]:
    """Flags of other rules' parameters, each of which takes one value.

    Raises:
        ValueError: an unknown rule.
    """
    own = find_rule(rule).parameters
    return tuple(flag for flag, parameter in PARAMETER_OF.items() if parameter not in own)


def refuse_unread(argv: Sequence[str], rules: Sequence[str]) -> None:
    """Refuse flags that none of these rules reads.

    Args:
        argv: a command line, recipes expanded.
        rules: of the job, or of all arms that get the command line.

    Raises:
        ValueError: the flags, their values and the rules that read them; an unknown rule.
    """
    unread = set(PARAMETER_OF).intersection(*map(unread_flags, rules))
    found = [
        f"{flag} {flag_value(argv, flag)} (read by {', '.join(readers(parameter))})"
        for flag, parameter in PARAMETER_OF.items()
        if flag in unread and has_flag(argv, flag)
    ]
    if found:
        who = f"--token-weighting {rules[0]} does" if len(rules) == 1 else f"the arms {', '.join(rules)} do"
        raise ValueError(
            f"{who} not read {' and '.join(found)}: nothing would change; drop what is not read, or choose "
            "a rule that reads it"
        )
