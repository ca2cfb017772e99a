// Prints what Hugging Face's own reader finds in a GGUF file: node gguf_info.mjs FILE
import {gguf} from '@huggingface/gguf';

const {metadata, tensorInfos} = await gguf(process.argv[2], {allowLocalFile: true});
const tensors = tensorInfos.map(({name, shape, dtype}) => ({name, shape, dtype}));
console.log(JSON.stringify({metadata, tensors}, (_, value) => (typeof value === 'bigint' ? Number(value) : value)));
