"""The services on a Ray that others use, too."""

import openai
from ray import serve

from stormline.pipeline.serving import APPS, FRONT_APP, end_apps


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Theirs:
    def __call__(self):
        return "here"


def test_end_apps_when_others_have_their_own_on_this_serve_then_these_go_on(services):
    ours = {*APPS, FRONT_APP}
    serve.run(Theirs.options(name="Ending").bind(), name="ending", route_prefix=None)

    end_apps({"ending", "never began"})

    assert set(serve.status().applications) == ours
    with openai.OpenAI(base_url=f"{services.url}/v1", api_key=services.key, max_retries=0, timeout=60) as client:
        assert client.models.list().data
