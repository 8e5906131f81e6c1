"""One update, as a pure function of state and batch."""

from trainax_pk.step._eval_step import make_eval_step
from trainax_pk.step._keys import stream_key
from trainax_pk.step._state import TrainState
from trainax_pk.step._train_step import Info, make_train_step

__all__ = ["Info", "TrainState", "make_eval_step", "make_train_step", "stream_key"]
