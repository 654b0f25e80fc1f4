// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/decoder.py, with fixed K.
import Foundation

/// `numDraftTokens` 0 is plain decoding, nil the bundle's default.
public struct Options {
    public var maxNewTokens = 128
    public var numDraftTokens: Int?
    public var sampling: Sampling?

    public init(maxNewTokens: Int = 128, numDraftTokens: Int? = nil, sampling: Sampling? = nil) {
        (self.maxNewTokens, self.numDraftTokens, self.sampling) = (maxNewTokens, numDraftTokens, sampling)
    }
}

/// Counts of one text. Drafts after an end token or past the budget count as drafted, not as accepted.
public struct Stats {
    public var rounds = 0
    public var drafted = 0
    public var accepted = 0
    public var finishReason = ""

    /// Accepted drafts over proposed drafts, nil if nothing was drafted.
    public var acceptanceRate: Double? {
        drafted > 0 ? Double(accepted) / Double(drafted) : nil
    }
}

/// The decoding loop: prefill, then rounds. Token ids in, token ids out; text is the app's, for example by
/// swift-transformers, which reads the bundle's tokenizer.json. Call it from one thread at a time, not the main one.
public final class Decoder {
    public let engine: GraphEngine

    public init(bundle: URL) throws {
        engine = try GraphEngine(bundle: bundle)
    }

    /// Gives each new token to `onToken` until that returns false, the text ends, or the budget or context is used up.
    ///
    /// Speculative and plain decoding give the same tokens. `prompt` begins with the bundle's `tokens.bos`. Throws
    /// `InputError` for a prompt that cannot be run or impossible options.
    public func generate(prompt: [Int], options: Options, onToken: (Int) -> Bool) throws -> Stats {
        let manifest = engine.manifest
        let wanted = options.numDraftTokens ?? manifest.numDraftTokens.default
        try check(prompt, options, wanted)
        let sampling = try options.sampling ?? usualSampling()
        let room = manifest.maxSeqLen - prompt.count
        let outOfBudget = options.maxNewTokens <= room ? "length" : "max_seq_len"
        var (stats, left) = (Stats(), min(options.maxNewTokens, room))
        var done = try engine.prefill(prompt, sampling: sampling)
        var prefilled = true
        while true {
            let end = done.tokens.firstIndex { manifest.tokens.eos.contains($0) }
            if let end {
                // What follows an end token is dropped, also if it was accepted.
                done.tokens = Array(done.tokens[...end])
                done.accepted = min(done.accepted, done.tokens.count)
            }
            left -= done.tokens.count
            if !prefilled {
                stats.rounds += 1
                stats.drafted += done.drafted
                stats.accepted += done.accepted
            }
            prefilled = false
            if end != nil || left == 0 {
                stats.finishReason = end != nil ? "eos" : outOfBudget
            }
            for token in done.tokens {
                guard onToken(token) else {
                    stats.finishReason = "cancelled"
                    return stats
                }
            }
            if !stats.finishReason.isEmpty {
                return stats
            }
            let last = done.tokens[done.tokens.count - 1]
            // The bonus token needs a place in the budget as well.
            let drafts = try engine.draft(last: last, numDraftTokens: min(wanted, left - 1))
            done = try engine.verify(last: last, drafts: drafts, sampling: sampling)
        }
    }

    /// How tokens are chosen if nobody says otherwise; bundles that do not say are greedy.
    private func usualSampling() throws -> Sampling {
        guard let usual = engine.manifest.sampling else { return try Sampling() }
        return try Sampling(temperature: usual.temperature, topP: usual.topP, topK: usual.topK)
    }

    private func check(_ prompt: [Int], _ options: Options, _ drafts: Int) throws {
        let manifest = engine.manifest
        guard !prompt.isEmpty else {
            throw InputError("the prompt is empty: expected at least one token")
        }
        guard prompt.count < manifest.maxSeqLen else {
            throw InputError(
                "the prompt has \(prompt.count) tokens, the bundle's context has \(manifest.maxSeqLen) for prompt and "
                    + "answer together; shorten it, or export with a larger --max-seq-len"
            )
        }
        if let token = prompt.first(where: { !(0..<manifest.target.vocabSize).contains($0) }) {
            throw InputError("the prompt has token id \(token), expected 0 to \(manifest.target.vocabSize - 1)")
        }
        guard (0...manifest.numDraftTokens.max).contains(drafts) else {
            let most = manifest.numDraftTokens.max
            throw InputError("\(drafts) draft tokens a round were asked for, the bundle was exported for up to \(most)")
        }
        guard options.maxNewTokens >= 1 else {
            throw InputError("\(options.maxNewTokens) new tokens were asked for, expected at least 1")
        }
    }
}
