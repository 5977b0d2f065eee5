"""The JSON schema for editors: python -m config > config.schema.json"""

from config import json_schema

print(json_schema(), end="")
