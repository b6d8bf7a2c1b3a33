"""The commands of `var-deploy`: thin functions over the library, put together by `var_deploy.cli`."""
