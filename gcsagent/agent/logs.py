"""JSON log lines on standard error, with container, process and request ids as fields."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, TextIO

_TAKEN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class ContextLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger with fields; fields of a single call are added to them."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        fields = {**(self.extra or {}), **kwargs.get("extra", {})}
        kwargs["extra"] = {_field_name(name): value for name, value in fields.items()}
        return msg, kwargs


def _field_name(name: str) -> str:
    """logging raises KeyError for a field named like one of its own; ``process`` is its name for a pid."""
    if name == "process":
        return "process_id"
    return f"{name}_" if name in _TAKEN else name


def context(logger: logging.Logger, **fields: str) -> ContextLogger:
    return ContextLogger(logger, {name: value for name, value in fields.items() if value})


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says beyond what all of them have."""
    return {name: value for name, value in vars(record).items() if name not in _TAKEN}


def set_up(level: str) -> None:
    """Sends everything to standard error: the guest's console, or the terminal outside a guest."""
    root = logging.getLogger()
    root.handlers[:] = [_StandardError(sys.stderr)]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # What no line says need not be found out for each (logging's HOWTO, Optimization).
    for name in ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, name, None)


class _StandardError(logging.StreamHandler[TextIO]):
    """Makes its formatter for the first line, which comes when the agent is ready."""

    def format(self, record: logging.LogRecord) -> str:
        if self.formatter is None:
            self.setFormatter(_make_formatter())
        return super().format(record)


def _make_formatter() -> logging.Formatter:
    formatter: logging.Formatter = _make_formatter_class()(
        _FORMAT,
        rename_fields={"asctime": "time", "levelname": "level"},
    )
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    formatter.converter = time.gmtime
    return formatter


def _make_formatter_class() -> Any:
    """python-json-logger 3 renamed the module; both are met in the field (Debian 12 and 13)."""
    try:
        base = importlib.import_module("pythonjsonlogger.json").JsonFormatter
    except ImportError:
        base = importlib.import_module("pythonjsonlogger.jsonlogger").JsonFormatter

    class Formatter(base):  # type: ignore[misc, valid-type]
        def add_fields(
            self, log_record: dict[str, Any], record: logging.LogRecord, message_dict: Any
        ) -> None:
            super().add_fields(log_record, record, message_dict)
            log_record.update(log_record.pop("fields", {}))

    return Formatter
