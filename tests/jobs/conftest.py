"""Fixtures of the pipeline's tests that the jobs' tests use too."""

from tests.pipeline.conftest import bucket as bucket
from tests.pipeline.conftest import make_set as make_set
from tests.pipeline.conftest import model_folder as model_folder
from tests.pipeline.conftest import object_store as object_store
