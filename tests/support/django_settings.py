"""Settings of the Django project that the tests mix in: a database in memory, and no more."""

DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
USE_TZ = True
