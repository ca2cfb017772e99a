#!/usr/bin/python3
"""What Jinja2 makes of chat templates, in the set-up of Hugging Face transformers: the goldens of our own renderer.

    tools/render_templates.py tests/data/templates     # (re)writes golden/*.json and snippets.json there

golden/NAME.json: NAME.jinja on every conversation of conversations.json (with tools.json where it asks for tools).
snippets.json: {variables, cases: [{template}]}; each case gets its `text`, or its `error`.
Needs python3-jinja2.
"""
import copy
import datetime
import json
import pathlib
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2026, 1, 15, 12, 0, 0)
# bos_token, eos_token of the templates' models; the rest have Llama's.
TOKENS = {
    'npm-qwen3': (None, '<|im_end|>'),
    'npm-deepseek_v3': ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'),
    'npm-llama3': ('<|begin_of_text|>', '<|end_of_text|>'),
}


class GenerationTag(Extension):
    """{% generation %}: transformers marks the tokens of its body with it; here the body is just kept."""

    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method('_keep'), [], [], body).set_lineno(line)

    def _keep(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[GenerationTag, 'jinja2.ext.loopcontrols'])
    made.filters['tojson'] = to_json
    made.globals['raise_exception'] = raise_exception
    made.globals['strftime_now'] = NOW.strftime
    return made


def render(source, variables):
    try:
        # A copy: a filter may change what it is given (indent adds to a list).
        return {'text': environment().from_string(source).render(**copy.deepcopy(variables))}
    except Exception as error:  # whatever it is, our renderer has to fail too
        return {'error': f'{type(error).__name__}: {error}'}


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + '\n')


def main():
    folder = pathlib.Path(sys.argv[1])
    conversations = json.loads((folder / 'conversations.json').read_text())
    tools = json.loads((folder / 'tools.json').read_text())
    for path in sorted(folder.glob('*.jinja')):
        bos, eos = TOKENS.get(path.stem, ('<s>', '</s>'))
        cases = []
        for one in conversations:
            variables = dict(messages=one['messages'], tools=tools if one.get('tools') else None, documents=None,
                             add_generation_prompt=one['add_generation_prompt'], eos_token=eos, **one.get('kwargs', {}))
            if bos is not None:
                variables['bos_token'] = bos
            given = {'messages': one['messages'], 'tools': one.get('tools', False),
                     'add_generation_prompt': one['add_generation_prompt'], 'kwargs': one.get('kwargs', {})}
            cases.append({'id': one['id'], 'input': given, **render(path.read_text(), variables)})
        write(folder / 'golden' / f'{path.stem}.json',
              {'template': path.stem, 'bos_token': bos, 'eos_token': eos, 'now': '2026-01-15',
               'oracle': f'jinja2 {jinja2.__version__} (transformers set-up)', 'cases': cases})
    snippets = json.loads((folder / 'snippets.json').read_text())
    for one in snippets['cases']:
        one.pop('text', None), one.pop('error', None)
        one.update(render(one['template'], snippets['variables']))
    lines = ',\n'.join(json.dumps(one, ensure_ascii=False) for one in snippets['cases'])
    variables = json.dumps(snippets['variables'], ensure_ascii=False)
    (folder / 'snippets.json').write_text(f'{{"variables": {variables},\n"cases": [\n{lines}\n]}}\n')
    cases = snippets['cases']
    print(f'{len(cases)} snippets, {sum("error" in one for one in cases)} of them errors')


main()
