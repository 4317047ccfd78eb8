"""vLLM's loader of images and videos, where what is wrong with a client's media is told the client.

vLLM 0.32 answers HTTP 500 or 501 to an address that cannot be reached, to `file://`, to data that
is not base64, to a decompression bomb and to whatever else a decoder raises on damaged bytes.
Only vLLM imports this file (`vlm/vllm_plugin.py`).
"""

from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector


@MEDIA_CONNECTOR_REGISTRY.register("http")  # the name of vLLM's own, which this one replaces
class ClientsMedia(MediaConnector):
    """Every failure is a 4xx; the servers' method alone, as an engine in-process raises anyway."""

    async def load_from_url_async(self, url, media_io, *, fetch_timeout=None):
        try:
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        except (VLLMError, ValueError, MemoryError):
            raise  # answered right: 4xx, 400, and 500
        except Exception as error:  # decoders raise all kinds on damaged bytes
            reason = str(error) or type(error).__name__
            message = f"An image or video of the request cannot be loaded: {reason}"
            raise VLLMUnprocessableEntityError(message) from error
