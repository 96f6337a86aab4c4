"""`from_pretrained`, `save_pretrained` and `push_to_hub` of a model, as in huggingface_hub's PyTorchModelHubMixin.

The mixin itself would need huggingface_hub at every import of a model, and reads and writes any config.json.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Self


class HubMethods:
    """The interface of `huggingface_hub.PyTorchModelHubMixin`, for files that `aezoo.save_model` writes.

    Of the mixin's arguments these have no `config`, which is the model's hyperparameters, and no patterns of file
    names, because a model's files belong together.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Load a model of this class in eval mode.

        Args:
            pretrained_model_name_or_path: what `aezoo.load_model` takes, such as a folder or a tag, or the name of a
                repository on the hub, `user/name`.
            force_download: download files even if they are in the cache.
            token: token of the hub; by default the one that huggingface_hub finds (`hf auth login`, `HF_TOKEN`).
            cache_dir: folder of downloaded files; by default huggingface_hub's.
            local_files_only: only use files in the cache.
            revision: a branch, a tag or a commit of the repository.
            **model_kwargs: hyperparameters that shall differ from the saved ones and fit the weights.

        Raises:
            AezooError: as in `aezoo.load_model`; or the model is of another class, or a hyperparameter does not exist
                or does not fit the weights.
        """
        model: Self = import_module("aezoo.io.hub").from_pretrained(
            cls,
            pretrained_model_name_or_path,
            revision=revision,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            **model_kwargs,
        )
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the files of `aezoo.save_model` and a model card to a folder, and upload them if asked to.

        Args:
            save_directory: the folder, created if it does not exist.
            repo_id: the repository, `user/name`, for `push_to_hub`.
            push_to_hub: upload the model, too.
            model_card_kwargs: `license`, `metrics` and `results` of the card, as in `aezoo.push_to_hub`.
            **push_to_hub_kwargs: arguments of `push_to_hub`.

        Returns:
            What `push_to_hub` returns, if asked to.

        Raises:
            AezooError: as in `aezoo.save_model` or `push_to_hub`.
        """
        hub = import_module("aezoo.io.hub")
        card = dict(model_card_kwargs or {})
        folder = hub.save_model(self, save_directory)
        hub.write_card(folder, repo_id or str(save_directory), **card)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the model to a repository on the hub, as `aezoo.push_to_hub` does.

        Args:
            repo_id: `user/name`; the repository is created if it does not exist.
            commit_message: by default the model's name.
            private: whether only the owner sees a new repository; by default the owner's settings decide.
            token: token of the hub; by default the one that huggingface_hub finds.
            branch: the branch, created if it does not exist; by default the main branch.
            create_pr: propose the commit to the repository's owner instead of making it.
            model_card_kwargs: `license`, `metrics` and `results` of the card.

        Returns:
            The address of the commit's page, or of the proposal's.

        Raises:
            AezooError: as in `aezoo.push_to_hub`.
        """
        url: str = import_module("aezoo.io.hub").push_to_hub(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=branch,
            create_pr=create_pr,
            **(model_card_kwargs or {}),
        )
        return url
