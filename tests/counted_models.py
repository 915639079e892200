"""Counts, inside a notebook's kernel, how many models other than the packaged ones are open at once."""

import gc
import json
import weakref

from rlaifv_nb.engine import models
from rlaifv_nb.records import package_folder


def count_models(log):
    """Wraps `open_weights`: every model that is opened is noted in the file `log`, with how many large ones
    are then open.

    Raises AssertionError in the kernel when a second large one is opened while the first is still held."""
    opened, open_weights = [], models.open_weights

    def counting(auto_class, name, *args, **kwargs):
        is_packaged = (
            str(name).startswith("packaged:") or package_folder("data") in models.Path(str(name)).parents
        )
        gc.collect()
        alive = sum(reference() is not None for reference in opened)
        with open(log, "a") as f:
            f.write(
                json.dumps({"name": str(name), "large": not is_packaged, "alive": alive + (not is_packaged)})
                + "\n"
            )
        assert is_packaged or not alive, f"{name} is opened while another large model is held"
        found = open_weights(auto_class, name, *args, **kwargs)
        if not is_packaged:
            opened.append(weakref.ref(found))
        return found

    models.open_weights = counting
