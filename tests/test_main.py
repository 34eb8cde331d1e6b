import signal
import sys
import types

from charlm import __main__


def test_ctrl_c_while_the_command_line_is_imported_ends_with_130(monkeypatch, capsys):
    def interrupted_import(name):
        signal.raise_signal(signal.SIGINT)
        return lambda: 0

    module = types.ModuleType("charlm.cli")
    module.__getattr__ = interrupted_import
    monkeypatch.setitem(sys.modules, "charlm.cli", module)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert __main__.main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "charlm: interrupted\n"
