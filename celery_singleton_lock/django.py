"""DjangoSingletonTask: Celery's task class for Django, with a lock. Only this needs Django."""

from __future__ import annotations

from typing import Any

from celery.contrib.django.task import DjangoTask

from .task import SingletonTask


class DjangoSingletonTask(SingletonTask, DjangoTask):
    """:class:`SingletonTask` that can be published when a transaction commits.

    ::

        @shared_task(base=DjangoSingletonTask)
        def send_invoice(order_id): ...

        with transaction.atomic():
            order = Order.objects.create(...)
            send_invoice.delay_on_commit(order.pk)

    ``Celery(task_cls=DjangoSingletonTask)`` makes every task of an app such a one.
    """

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Publish when the transaction commits; outside of one, at once.

        Raises:
            KeyDerivationError: An argument has no lock key; the commit publishes nothing.
        """
        self._call(args, kwargs, None)
        super().delay_on_commit(*args, **kwargs)

    def apply_async_on_commit(
        self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any
    ) -> None:
        """As :meth:`delay_on_commit`, with the parameters of ``apply_async``.

        Raises:
            KeyDerivationError: An argument has no lock key; the commit publishes nothing.
        """
        self._call(args or (), kwargs or {}, options.get("serializer"))
        super().apply_async_on_commit(args, kwargs, *rest, **options)
