"""Hidden channels put in order by recorded calls, so that every width is the best of its size."""
