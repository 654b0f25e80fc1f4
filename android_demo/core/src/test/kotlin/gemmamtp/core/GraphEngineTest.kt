package gemmamtp.core

import java.io.File
import java.util.Random
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** The cache grows, moves and rolls back without losing a row. */
class GraphEngineTest {
    private lateinit var target: FakeGraph

    private fun engine(directory: File, numTokens: Int = 16, type: KVType = KVType.FLOAT32, layout: List<String> = HEADS_FIRST) =
        FakeBundle(directory, numTokens, type, layout).also { target = it.target }.engine

    @Test
    fun everyRowIsWhereItBelongs() = inTemporaryDirectory { directory ->
        for (drafts in listOf(0, 1, 4, 5, null)) {
            for (prompt in listOf(listOf(3), List(17) { it }, List(300) { it * 7 % FAKE_VOCAB })) {
                val engine = engine(directory)
                val options = Options(2000, drafts)
                val written = Rounds(engine, prompt, options, Stats(), DraftLength(5, Costs(5, 2))).asSequence()
                val text = prompt.toMutableList()
                for (token in written.flatMap { it.tokens }) {
                    assertEquals(chosenAfter(text), token, "token ${text.size} with $drafts drafts")
                    text.add(token)
                }
                assertEquals(900, text.size)
                assertTrue(engine.cache.windowStart >= 900 - FAKE_WINDOW - 3 * SLIDE_ROWS)
            }
        }
    }

    @Test
    fun everyTypeAndLayoutOfTheCache() = inTemporaryDirectory { directory ->
        val rowsFirst = listOf("rows", "num_key_value_heads", "head_dim")
        for ((type, layout) in listOf(KVType.FLOAT16 to HEADS_FIRST, KVType.FLOAT32 to rowsFirst, KVType.FLOAT16 to rowsFirst)) {
            val engine = engine(directory, type = type, layout = layout)
            val text = MutableList(300) { it * 7 % FAKE_VOCAB }
            val written = Rounds(engine, text.toList(), Options(2000, 4), Stats(), DraftLength(5, Costs(5, 2))).asSequence()
            for (token in written.flatMap { it.tokens }) {
                assertEquals(chosenAfter(text), token, "token ${text.size}, $type $layout")
                text.add(token)
            }
            assertEquals(900, text.size)
        }
    }

    @Test
    fun resumesWhereTheWindowHasAllRows() = inTemporaryDirectory { directory ->
        val engine = engine(directory)
        engine.prefill(List(600) { 3 }, Sampled())
        assertTrue(engine.cache.canResume(599))
        assertEquals(false, engine.cache.canResume(100))
    }

    /** Texts that share beginnings, cancelled or failing at any chunk, or not: nothing is run in vain, and nothing is lost. */
    @Test
    fun promptsThatEndEarlyLoseNothing() = inTemporaryDirectory { directory ->
        val random = Random(0)
        val engine = engine(directory)
        val decoder = Decoder(engine, null, null, DraftLength(5, Costs(5, 2)))
        var text = listOf(1)
        repeat(150) {
            val new = List(1 + random.nextInt(70)) { random.nextInt(FAKE_VOCAB) }
            val prompt = (text.take(1 + random.nextInt(text.size)) + new).take(880)
            val reused = engine.cache.reusable(prompt)
            val stopsAfter = random.nextInt((prompt.size - reused + 15) / 16 + 1)
            val ends = reused + 16 * stopsAfter
            val (cancels, fails) = random.nextInt(3).let { (it == 1) to (it == 2 && stopsAfter > 0) }
            val (passes, seen) = target.passes to ArrayList<Int>()
            if (fails) target.left = stopsAfter
            lateinit var stream: Stream
            stream = decoder.stream(prompt.toIntArray(), Options(8, 3)) { done, total ->
                assertEquals(prompt.size, total)
                seen.add(done)
                if (cancels && seen.size == stopsAfter + 1) stream.cancel()
            }
            text = prompt
            if (fails) {
                assertFailsWith<InputError> { stream.next() }
                assertEquals(prompt.take(ends - 16), engine.cache.tokens)
            } else if (cancels) {
                assertEquals(false, stream.hasNext())
                assertEquals("cancelled", stream.stats.finishReason)
                assertEquals(stopsAfter, target.passes - passes)
                assertEquals((0..stopsAfter).map { minOf(reused + 16 * it, prompt.size) }, seen)
                if (stopsAfter > 0) assertEquals(prompt.take(ends), engine.cache.tokens)
            } else {
                for (token in stream) text = text.also { assertEquals(chosenAfter(it), token.id) } + token.id
                assertEquals(prompt.size + 8, text.size)
                assertEquals(prompt.size, seen.last())
            }
            assertEquals(reused, stream.stats.reusedTokens)
        }
    }

    /** Memory for so many of two larger buffers is there: what was in the cache goes on as if nothing had been tried. */
    @Test
    fun growingHappensToAllBuffersOrToNone() = inTemporaryDirectory { directory ->
        for (given in 0..1) {
            val engine = engine(directory, numTokens = 200)
            var left = Int.MAX_VALUE
            engine.cache = Cache(engine.manifest) { if (left-- > 0) direct(it) else throw OutOfMemoryError() }
            val text = List(250) { it * 7 % FAKE_VOCAB }
            engine.prefill(text, Sampled())
            val tensors = engine.cache.tensors
            left = given
            assertFailsWith<OutOfMemoryError> { engine.prefill(text + List(10) { it }, Sampled(), 250) }
            assertTrue(tensors === engine.cache.tensors)
            assertEquals(text, engine.cache.tokens)
            assertEquals(listOf(chosenAfter(text + 3)), engine.prefill(text + 3, Sampled(), 250).tokens)
            left = 2
            val longer = text + List(10) { it }
            assertEquals(listOf(chosenAfter(longer)), engine.prefill(longer, Sampled(), 250).tokens)
            assertEquals(0, left)
        }
    }

    @Test
    fun anotherCacheTakesItsPlace() = inTemporaryDirectory { directory ->
        val engine = engine(directory)
        val caches = List(2) { Cache(engine.manifest) }
        var texts = listOf(List(40) { it }, List(300) { it * 7 % FAKE_VOCAB })
        repeat(3) {
            texts = texts.mapIndexed { i, text ->
                engine.cache = caches[i]
                val next = engine.prefill(text, Sampled(), engine.cache.reusable(text)).tokens.single()
                assertEquals(chosenAfter(text), next)
                val round = engine.verify(next, engine.draft(next, 3), Sampled())
                round.tokens.fold(text + next) { before, token -> before.also { assertEquals(chosenAfter(it), token) } + token }
            }
        }
        assertEquals(texts.map { it.size - 1 }, caches.map { it.position })
    }

    @Test
    fun graphsAreClosedWhereItsBuffersDoNotFit() = inTemporaryDirectory { directory ->
        val (manifest, graph) = FakeBundle(directory).manifest to FakeGraph(true, false)
        val large = smallManifest(FAKE_VOCAB, 900, 5, numTokens = Int.MAX_VALUE, tables = manifest.tables)
        assertFailsWith<IllegalStateException> { loadEngine(directory, large, { _, _, _ -> mapOf("target" to graph) }) }
        assertTrue(graph.closed)
    }
}
