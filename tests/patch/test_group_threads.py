"""Groups in several threads: none sees what another one's siblings left for each other."""

import threading

import torch

from tests.patch.test_groups import attention, learned
from tests.patch.toys import inputs, stock


def test_threads_do_not_see_each_others_results():
    model = learned(attention())
    xs = [inputs(seed=i).detach() for i in range(4)]
    with torch.no_grad(), stock():
        expected = [model(x) for x in xs]
    errors = []
    turn = threading.Barrier(4)

    def work(i):
        try:
            turn.wait()
            for j in range(60):
                with torch.set_grad_enabled(j % 2 == 0):
                    y = model(xs[i])
                if not torch.allclose(y, expected[i], rtol=1e-5, atol=1e-6):
                    errors.append(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_one_tensor_in_two_threads_between_siblings():
    """Another thread calls the second layer while the first thread is between both."""
    model = learned(attention(lora_dropout=0.5))
    inner = model.base_model.model
    x, out = inputs(), []
    q = inner.q(x)

    def other():
        out.append(inner.k(x))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    mine = inner.k(x)
    assert mine.grad_fn is q.grad_fn is not out[0].grad_fn and not torch.equal(mine, out[0])
