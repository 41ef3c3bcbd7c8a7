"""Fixtures of the pipeline's tests that the jobs' tests use too."""

from tests.pipeline.conftest import make_set as make_set
from tests.pipeline.conftest import model_folder as model_folder
from tests.pipeline.conftest import tracking_template as tracking_template
from tests.pipeline.conftest import tracking_uri as tracking_uri
