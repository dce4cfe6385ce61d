// Scores of a GGUF file by llama.cpp's C API, for probe_llama_cpp.py.
// Compiled against the headers of the release whose shared object is loaded beside it.

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "llama.h"

extern "C" {

static void warnings_only(ggml_log_level level, const char *text, void *) {
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

void *scores_load(const char *path) {
    llama_log_set(warnings_only, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    return llama_model_load_from_file(path, params);
}

int32_t scores_vocabulary(void *model) {
    return llama_vocab_n_tokens(llama_model_get_vocab(static_cast<llama_model *>(model)));
}

// Write the logits after each token; return 0 if all were computed.
int32_t scores_logits(void *loaded, const int32_t *tokens, int32_t count, float *out) {
    auto *model = static_cast<llama_model *>(loaded);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = std::max(count, 64);
    params.n_threads = params.n_threads_batch = 1;  // its threads spin: on busy cores they wait
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = GGML_TYPE_F32;
    llama_context *context = llama_init_from_model(model, params);
    if (context == nullptr) return -100;
    llama_batch batch = llama_batch_init(count, 0, 1);
    batch.n_tokens = count;
    for (int32_t i = 0; i < count; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    int32_t status = llama_decode(context, batch);
    const int32_t vocabulary = scores_vocabulary(loaded);
    for (int32_t i = 0; status == 0 && i < count; i++) {
        const float *logits = llama_get_logits_ith(context, i);
        std::copy(logits, logits + vocabulary, out + static_cast<int64_t>(i) * vocabulary);
    }
    llama_batch_free(batch);
    llama_free(context);
    return status;
}

void scores_free(void *model) { llama_model_free(static_cast<llama_model *>(model)); }
}
