"""The turn of an engine by itself: who gets it, who is refused, and what happens to one that was left behind."""

import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from orthrus_rt.exclusive import Turn


def test_a_lock_left_behind_has_one_successor_at_a_time():
    """However many threads find that its holder is gone, and whether they leave it behind too or let it go."""
    turn, inside, most, taken = Turn(), [], [], [0] * 4
    interval = sys.getswitchinterval()

    def hold(i, leave):
        turn.hold(sys._getframe())
        inside.append(i)
        time.sleep(0)
        most.append(len(inside))
        taken[i] += 1
        inside.remove(i)
        if not leave:
            turn.holder = {}

    def compete(i):
        rng = random.Random(i)
        while taken[i] < 1000:
            try:
                hold(i, rng.random() < 0.5)
            except RuntimeError:
                most.append(0)
            time.sleep(0)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(compete, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert max(most) == 1


def test_a_lock_that_is_let_go_and_taken_at_the_last_moment():
    """Whoever had looked at it before is refused."""
    turn, mine = Turn(), sys._getframe()

    class Old(dict):
        def setdefault(self, place, taker):
            turn.holder = {}
            turn.hold(mine)
            return super().setdefault(place, taker)

    turn.holder = Old()
    with pytest.raises(RuntimeError, match="in the middle of a call"), turn:
        pass


def test_a_lock_left_behind_is_taken_over_by_its_thread():
    turn = Turn()

    def leave_behind():
        turn.__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave_behind()
    with turn, pytest.raises(RuntimeError, match="in the middle of a call"), turn:
        pass
    refused = []

    def elsewhere():
        try:
            turn.__enter__()
        except RuntimeError as error:
            refused.append(str(error))

    with turn:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert refused == ["this engine is in use by another thread; share it through orthrus_rt.AsyncEngine"]
    with turn:
        pass


def test_a_lock_that_is_claimed_while_another_thread_is_about_to_take_it(monkeypatch):
    """The lock remains its owner's, and is free."""

    class Owner:
        pass

    turn, owner, looks = Turn(), Owner(), []
    look = turn._check_owner

    def look_and_be_overtaken():
        look()
        looks.append(None)
        if len(looks) == 1:
            claiming = threading.Thread(target=turn.claim, args=(owner,))
            claiming.start()
            claiming.join()

    monkeypatch.setattr(turn, "_check_owner", look_and_be_overtaken)
    with pytest.raises(RuntimeError, match="belongs to an Owner"), turn:
        pass
    turn.release()
    with turn:
        pass
