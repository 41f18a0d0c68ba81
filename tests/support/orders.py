"""A model, and a body that takes one. Its annotation is no string: Celery 5.5 reads none."""

from pydantic import BaseModel


class Order(BaseModel):
    sku: str
    quantity: int = 1


def place_order(self, order: Order):
    """Returns what a body can read only from a model."""
    return order.sku
