"""A worker whose site is a stand-in that loads no model: `python office.py FOLDER SECONDS`."""

import os
import signal
import sys
import time
import types

from fedtri.communication.flower_calls import Called, SiteError
from fedtri.deploy import worker


class Office:
    """Does what the call's client is called, and writes down each call that it works on."""

    def __init__(self, loading) -> None:
        self.loading, self.loaded = loading, False

    def open(self, path, call: Called, node, config) -> "Office":
        if call.client == "loads" and not self.loaded:
            self.loading(True)
            time.sleep(1.0)
            self.loaded = True
            self.loading(False)
        if call.client == "refuses":
            raise SiteError("reading its data")
        return self


def respond(opened: Office, call: Called) -> bytes:
    with open(f"{sys.argv[1]}/worked", "a") as worked:
        worked.write(f"{os.getpid()} {call.client}\n")
    dies = call.client == "dies" or (call.client == "dies once" and not os.path.exists(f"{sys.argv[1]}/died"))
    if dies:
        open(f"{sys.argv[1]}/died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if call.client == "trains":
        time.sleep(60)
    return call.data[::-1]


if __name__ == "__main__":
    sys.modules["fedtri.deploy.site"] = types.ModuleType("fedtri.deploy.site")
    sys.modules["fedtri.deploy.site"].__dict__.update(Office=Office, respond=respond)
    worker.main()
