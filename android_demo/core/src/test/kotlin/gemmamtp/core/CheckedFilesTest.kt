package gemmamtp.core

import java.io.File
import java.nio.file.Files
import java.nio.file.StandardCopyOption
import java.nio.file.attribute.FileTime
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNull

/** A bundle's files are read once, and again where they may have changed. */
class CheckedFilesTest {
    private class Checked(root: File) {
        val bundle = File(root, "bundle").apply { mkdirs() }
        val device = File(root, "devices/bundle")
        private val files = mapOf("a" to "abc", "b" to "defg").mapValues { (name, text) ->
            val file = File(bundle, name).apply { writeText(text) }
            FileMetadata(file.length(), fileSha256(file))
        }

        fun changed(
            device: File? = this.device,
            verify: Boolean = false,
            settled: Long = -1_000_000_000, // as if it had been written long ago
            digest: String = "0",
            files: Map<String, FileMetadata> = this.files,
        ): String? {
            val manifest = smallManifest(50, 900, 5, digest = digest, files = files)
            return firstChangedFile(bundle, manifest, device, verify, settled = settled)
        }

        /** The files that are read: in those a wrong sha256 would be noticed. */
        fun read(device: File? = this.device, verify: Boolean = false, digest: String = "0"): Set<String> =
            files.keys.filter { name ->
                val record = File(this.device, "checked-files.json")
                val before = if (record.exists()) record.readText() else null
                val wrong = files + (name to FileMetadata(files.getValue(name).size, "of other content"))
                val isRead = changed(device, verify, digest = digest, files = wrong) == name
                if (before == null) record.delete() else record.writeText(before)
                isRead
            }.toSet()
    }

    private val all = setOf("a", "b")

    @Test
    fun `files are read once`() = inTemporaryDirectory { directory ->
        val checked = Checked(directory)
        assertEquals(all, checked.read())
        assertNull(checked.changed())
        assertEquals(emptySet(), checked.read())
        assertEquals(all, checked.read(verify = true))
        assertEquals(all, checked.read(device = null))
        assertEquals(all, checked.read(digest = "of another bundle"))
        assertNull(checked.changed(verify = true))
        assertEquals(emptySet(), checked.read())
        assertEquals(listOf("checked-files.json"), checked.device.list()!!.toList())
    }

    @Test
    fun `files that changed are read again`() = inTemporaryDirectory { directory ->
        val checked = Checked(directory)
        checked.changed()
        val file = File(checked.bundle, "b")
        val before = Files.getLastModifiedTime(file.toPath())
        file.writeText("defh")
        Files.setLastModifiedTime(file.toPath(), before) // what ctime gives away
        assertEquals(setOf("b"), checked.read())
        assertEquals("b", checked.changed())
        file.writeText("defg")
        assertNull(checked.changed())
        assertEquals(emptySet(), checked.read())
        val copy = File(checked.bundle, "copy")
        Files.copy(file.toPath(), copy.toPath(), StandardCopyOption.COPY_ATTRIBUTES)
        Files.move(copy.toPath(), file.toPath(), StandardCopyOption.REPLACE_EXISTING)
        assertEquals(setOf("b"), checked.read())
    }

    @Test
    fun `files that were written just before are not kept as right`() = inTemporaryDirectory { directory ->
        val checked = Checked(directory)
        assertNull(checked.changed(settled = 2_000_000_000))
        assertEquals(all, checked.read())
        assertFalse(checked.device.exists())
        val old = FileTime.fromMillis(0)
        Files.setLastModifiedTime(File(checked.bundle, "a").toPath(), old) // its ctime is new
        assertNull(checked.changed(settled = 2_000_000_000))
        assertEquals(all, checked.read())
    }

    @Test
    fun `a damaged record and a folder that cannot be made count for nothing`() = inTemporaryDirectory { directory ->
        val checked = Checked(directory)
        checked.changed()
        val record = File(checked.device, "checked-files.json")
        for (content in listOf("", "[]", "{", """{"version": 1}""", """{"version": 2, "bundle": "0", "files": {}}""", """{"version": 1, "bundle": "0", "files": {"a": 1}}""")) {
            record.writeText(content)
            assertEquals(all, checked.read(), content)
        }
        val taken = File(directory, "file").apply { writeText("") }
        assertNull(checked.changed(device = File(taken, "below")))
    }
}
