"""The routes of workflow templates: which there are and what they take; `tasks.run` runs one."""

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from comfyd.api.responses import JsonResponse, base_url
from comfyd.api.schemas import TemplateInputView, TemplateProblemView, WorkflowListView, WorkflowView
from comfyd.api.state import state_of
from comfyd.workflows import TemplateInput, WorkflowTemplate, json_schema


async def list_workflows(request: Request) -> Response:
    """`GET /api/workflows`."""
    catalog = state_of(request).catalog
    problems = catalog.problems()
    messages = {problem.name: problem.message for problem in problems}
    base = base_url(request)
    answer = WorkflowListView(
        workflows=tuple(_view(template, messages.get(template.name), base) for template in catalog.list()),
        problems=tuple(
            TemplateProblemView(
                name=problem.name, file=problem.file, line=problem.line, message=problem.message
            )
            for problem in problems
        ),
    )
    return JsonResponse(answer)


async def read_workflow(request: Request) -> Response:
    """`GET /api/workflows/{name}`."""
    catalog = state_of(request).catalog
    template = catalog.get(request.path_params["name"])
    problem = next((found.message for found in catalog.problems() if found.name == template.name), None)
    return JsonResponse(_view(template, problem, base_url(request)))


def _view(template: WorkflowTemplate, problem: str | None, base: str) -> WorkflowView:
    return WorkflowView(
        name=template.name,
        title=template.title,
        description=template.description,
        inputs=tuple(_input_view(spec) for spec in template.inputs),
        input_schema=json_schema(template),
        problem=problem,
        version=template.version,
        run=f"{base}/api/workflows/{quote(template.name)}/run",
    )


def _input_view(spec: TemplateInput) -> TemplateInputView:
    return TemplateInputView(
        name=spec.name,
        title=spec.title or spec.name,
        description=spec.description,
        type=spec.type,
        default=spec.default,
        minimum=spec.minimum,
        maximum=spec.maximum,
        step=spec.step,
        choices=spec.choices or None,
        required=spec.required,
        random=spec.random,
    )
