package gemmamtp.download

import gemmamtp.core.MANIFEST
import java.io.File
import java.io.RandomAccessFile
import kotlin.test.BeforeTest
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNull
import kotlin.test.assertTrue

/** Whatever ends a download, a whole bundle is in place, and the next download goes on. */
class InstallTest : DownloadCase() {
    private val older = bundleOf("w" to bytes(7, 800), "same" to bytes(2, 250), "gone" to bytes(8, 10))

    @BeforeTest
    fun begin() = serve()

    private fun damage(file: File) = RandomAccessFile(file, "rw").use {
        it.seek(file.length() / 2)
        it.write(it.read() xor 1)
    }

    @Test
    fun aDownloadEndedAtAnyBlockGoesOn() {
        put(place, older)
        var runs = 0
        while (true) {
            var calls = 0
            runs += 1
            try {
                download(progress = { _, _ -> if (++calls > runs) throw Ended() })
                break
            } catch (_: Ended) {
                assertSame(older, place)
                assertEquals(place, installedBundle(place))
            }
        }
        assertTrue(runs > 10)
        assertInstalled()
        val (manifests, files) = server.asked().partition { it == MANIFEST }
        assertEquals(1, manifests.size)
        assertEquals(files.size, files.toSet().size, "no request is made twice: each run adds a block")
    }

    @Test
    fun theOldBundleStaysUntilTheNewOneHasOpened() {
        put(place, older)
        assertFailsWith<Ended> { download { throw Ended() } }
        assertSame(older, place)
        server.close() // all is here
        download {
            assertSame(bundle, it)
            assertSame(older, place)
        }
        assertInstalled()
        assertEquals(2, opened.size)
    }

    /** What a kill leaves after each step of the change, from the folder aside to the removal of the old bundle. */
    @Test
    fun aKillAtAnyStepLeavesAWholeBundle() {
        val half = older - MANIFEST - "gone"
        val fetched = bundle - MANIFEST + (".$MANIFEST" to bundle.getValue(MANIFEST))
        val steps = listOf(
            mapOf("bundle" to older, "bundle.download" to fetched) to older,
            mapOf("bundle" to older, "bundle.download" to bundle) to older,
            mapOf(".old-bundle" to older, "bundle.download" to bundle) to older,
            mapOf(".old-bundle" to older, "bundle" to bundle) to bundle,
            mapOf(".old-bundle" to half, "bundle" to bundle) to bundle,
            mapOf(".old-bundle" to half, "bundle.download" to bundle) to null, // and the app has removed its bundle
            mapOf("bundle.download" to bundle) to null,
        )
        server.close()
        for ((folders, usable) in steps) for (started in listOf(true, false)) {
            folder.listFiles().orEmpty().forEach { it.deleteRecursively() }
            for ((name, files) in folders) put(File(folder, name), files)
            if (started) {
                if (usable == null) assertNull(installedBundle(place)) else assertSame(usable, installedBundle(place)!!)
            }
            download { if (usable != null) assertSame(usable, place) }
            assertInstalled()
        }
    }

    @Test
    fun theOldBundleReturnsIfTheNewOneCannotTakeItsPlace() {
        put(place, older)
        assertTrue("bundle.download cannot be renamed to it" in refused { download { it.deleteRecursively() } })
        assertSame(older, place)
    }

    @Test
    fun filesOfTheOldBundleAreCopied() {
        for (copied in listOf(0, 1, 100, 249)) { // by an earlier run
            put(place, older)
            put(aside, mapOf(part("v w").name to bytes(2, 250).copyOf(copied)))
            download()
            assertEquals(listOf(MANIFEST, "w"), server.asked())
            assertInstalled()
            server.requests.clear()
            place.deleteRecursively()
        }
    }

    @Test
    fun aDamagedFileOfTheOldBundleIsFetched() {
        put(place, older)
        damage(File(place, "same"))
        download()
        assertEquals(listOf(MANIFEST, "w", "v%20w"), server.asked())
        assertInstalled()
        for (broken in listOf<(File) -> Unit>({ it.delete() }, { it.writeBytes(bytes(2, 100)) }, { it.delete() && it.mkdirs() })) {
            server.requests.clear()
            place.deleteRecursively()
            put(place, older)
            broken(File(place, "same"))
            download()
            assertEquals("v%20w", server.asked().last().substringBefore("@"))
            assertInstalled()
        }
    }

    @Test
    fun anOldBundleThatCannotBeReadIsReplaced() {
        put(place, mapOf(MANIFEST to "{}".toByteArray()))
        download()
        assertInstalled()
    }

    @Test
    fun ofABundleThatIsIncompleteOnlyWhatIsMissingIsFetched() {
        put(place, bundle - "w")
        download()
        assertEquals(listOf(MANIFEST, "w"), server.asked())
        assertInstalled()
    }

    @Test
    fun aFileThatIsThereTwiceIsFetchedOnce() {
        serve(bundleOf("w" to bytes(1, 1000), "again" to bytes(1, 1000)))
        download()
        assertEquals(listOf(MANIFEST, "w"), server.asked())
        assertInstalled()
    }

    @Test
    fun whatAnEarlierRunLeftIsDigestedAgain() {
        assertFailsWith<Ended> { download { throw Ended() } }
        damage(File(aside, "w"))
        server.requests.clear()
        download()
        assertEquals(listOf("w"), server.asked())
        assertInstalled()
        place.deleteRecursively()
        put(aside, mapOf(part("w").name to bytes(1, 1000).copyOf(400), "v w" to bytes(2, 250) + 1))
        damage(part("w"))
        server.requests.clear()
        download()
        assertEquals(listOf(MANIFEST, "w@400", "w"), server.asked())
        assertInstalled()
    }

    @Test
    fun whatBelongsToAnotherBundleGoes() {
        put(aside, older + mapOf(".${sha(bytes(7, 800))}.part" to bytes(7, 300), "x.weights" to bytes(5, 5)))
        put(File(aside, "folder"), older)
        download()
        assertInstalled()
    }

    @Test
    fun aPlaceWithSomethingElseIsRefusedAndKept() {
        put(place, mapOf("letter.txt" to bytes(1, 10)))
        assertTrue("is not a bundle, expected one or nothing there" in refused())
        assertSame(mapOf("letter.txt" to bytes(1, 10)), place)
        place.deleteRecursively()
        place.mkdirs() // an empty one is as none
        download()
        assertInstalled()
    }

    @Test
    fun aPlaceThatCannotBeWrittenIsAnErrorOfOneLine() {
        aside.writeBytes(ByteArray(1))
        assertTrue("bundle.download: cannot be" in refused())
        assertTrue(aside.delete())
        File(folder, "bundle.lock").apply { delete() }.mkdirs()
        assertTrue("bundle.lock: cannot be" in refused())
    }

    @Test
    fun aBundleThatIsBeingReplacedIsNotPutBack() {
        put(place, older)
        download {
            val beside = File(folder, ".old-bundle")
            assertTrue(place.renameTo(beside))
            assertNull(installedBundle(place))
            assertTrue(beside.renameTo(place))
        }
        assertInstalled()
    }

    @Test
    fun aSecondDownloadIsRefusedWhileOneRuns() {
        download { assertTrue("another download to it is running" in refused()) }
        assertInstalled()
        place.deleteRecursively()
        download() // the first has ended
        assertInstalled()
    }

    /** Another process downloads: this one is refused, then the other is killed, and this one goes on. */
    @Test
    fun aKilledProcessLeavesNoLockAndWhatItFetched() {
        put(place, older)
        server.change = { request, honest -> if (request.name == "w") honest.copy(breakAfter = 600) else honest }
        val java = File(System.getProperty("java.home"), "bin/java").path
        val classes = System.getProperty("java.class.path")
        val command = listOf(java, "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp", classes, "gemmamtp.download.DownloadChildKt")
        val child = ProcessBuilder(command + server.url + sha(bundle.getValue(MANIFEST)) + place.path)
            .redirectError(ProcessBuilder.Redirect.INHERIT).start()
        try {
            assertEquals("600 of $bundleBytes", child.inputStream.bufferedReader().readLine())
            assertTrue("another download to it is running" in refused())
        } finally {
            child.destroyForcibly().waitFor()
        }
        assertSame(older, installedBundle(place)!!)
        server.change = { _, honest -> honest }
        server.requests.clear()
        download()
        assertEquals(listOf("w@600"), server.asked())
        assertInstalled()
    }
}
